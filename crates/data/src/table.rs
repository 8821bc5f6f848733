//! Tables as people have them: CSV and its relatives, gzipped or not, and ARFF.

mod arff;
mod delimited;
mod encoder;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use kiln_core::{Error, Result, write_atomic};

pub use encoder::{Encoded, EncodedColumn, Encoder};

/// Most bytes of a table, unpacked: a small packed file must not fill the memory.
const MAX_BYTES: u64 = 2 << 30;
/// Cells that stand for a value that is not there.
const MISSING: [&str; 12] = ["", "?", "NA", "N/A", "n/a", "na", "nan", "NaN", "NAN", "null", "NULL", "None"];

/// How a table is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableOptions {
    /// Numbers are written with a comma for the decimal point.
    pub decimal_comma: bool,
}

/// Named columns of one length.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    source: String,
    rows: usize,
    columns: Vec<Column>,
}

/// A column with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// The name in the header.
    pub name: String,
    /// What stands in it.
    pub cells: Cells,
}

/// The cells of a column: numbers if every cell that is there is one, words otherwise.
#[derive(Debug, Clone, PartialEq)]
pub enum Cells {
    /// Finite numbers, NaN where one is missing.
    Numbers(Vec<f64>),
    /// The distinct words in the order of their first appearance (or of their declaration), and for each row the number
    /// of its word.
    Words {
        /// Distinct words.
        words: Vec<String>,
        /// Places in `words`; `None` where one is missing.
        codes: Vec<Option<u32>>,
    },
}

impl Column {
    /// A column of numbers.
    pub fn numbers(name: impl Into<String>, numbers: Vec<f64>) -> Self {
        Self { name: name.into(), cells: Cells::Numbers(numbers) }
    }

    /// A column of words; `None` where one is missing.
    pub fn words<S: AsRef<str>>(name: impl Into<String>, cells: impl IntoIterator<Item = Option<S>>) -> Self {
        let mut distinct = Distinct::default();
        let codes = cells.into_iter().map(|cell| cell.map(|word| distinct.number(word.as_ref()))).collect();
        Self { name: name.into(), cells: Cells::Words { words: distinct.words, codes } }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        match &self.cells {
            Cells::Numbers(numbers) => numbers.len(),
            Cells::Words { codes, .. } => codes.len(),
        }
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A cell as text; `None` where it is missing.
    pub fn text(&self, row: usize) -> Option<String> {
        match &self.cells {
            Cells::Numbers(numbers) => Some(numbers[row]).filter(|x| !x.is_nan()).map(|x| x.to_string()),
            Cells::Words { words, codes } => codes[row].map(|code| words[code as usize].clone()),
        }
    }

    /// How many cells are missing.
    pub fn missing(&self) -> usize {
        match &self.cells {
            Cells::Numbers(numbers) => numbers.iter().filter(|x| x.is_nan()).count(),
            Cells::Words { codes, .. } => codes.iter().filter(|code| code.is_none()).count(),
        }
    }

    /// The first of the few words in a column that otherwise holds numbers: probably a slip.
    pub fn stray_word(&self) -> Option<&str> {
        let Cells::Words { words, .. } = &self.cells else { return None };
        let mut others = words.iter().filter(|word| word.parse::<f64>().is_err());
        let first = others.next()?;
        let few = words.len() >= 20 && (others.count() + 1) * 10 <= words.len();
        few.then_some(first.as_str())
    }

    /// These rows, in this order. All distinct words stay known.
    pub fn select(&self, rows: &[usize]) -> Self {
        let cells = match &self.cells {
            Cells::Numbers(numbers) => Cells::Numbers(rows.iter().map(|&row| numbers[row]).collect()),
            Cells::Words { words, codes } => {
                Cells::Words { words: words.clone(), codes: rows.iter().map(|&row| codes[row]).collect() }
            }
        };
        Self { name: self.name.clone(), cells }
    }
}

impl Table {
    /// Reads a table; the end of the name tells the format.
    ///
    /// - `.arff`: attributes and rows, dense or sparse
    /// - anything else: lines of cells between commas, semicolons or tabs (told by the first line), cells in double quotes
    ///   where they hold such a mark, column names in the first line
    ///
    /// Either may be gzipped (`.gz`). A cell that is empty, `?`, `NA`, `nan`, `null` or the like is missing.
    ///
    /// # Errors
    /// When the file cannot be read, is empty, a row has more or fewer cells than the header, two columns have one name, or
    /// a number is infinite; the message names the line.
    pub fn read(path: &Path, options: TableOptions) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        let packed = name.ends_with(".gz");
        let reader: Box<dyn Read> = match packed {
            true => Box::new(MultiGzDecoder::new(BufReader::new(file))),
            false => Box::new(file),
        };
        let mut bytes = Vec::new();
        reader.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| match packed {
            true => Error::input(path.display(), "cannot be unpacked")
                .caused_by(e)
                .hint("is it a complete gzip file?"),
            false => Error::io("read", path)(e),
        })?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::input(path.display(), format!("holds more than {} GiB", MAX_BYTES >> 30))
                .hint("cut the table into parts"));
        }
        let source = path.display().to_string();
        match name.trim_end_matches(".gz").ends_with(".arff") {
            true => Self::from_arff(&source, &bytes),
            false => Self::from_text(&source, &bytes, options),
        }
    }

    /// Reads lines of cells, as [`read`](Self::read) does, from memory; `source` names them in messages.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_text(source: &str, bytes: &[u8], options: TableOptions) -> Result<Self> {
        Self::from_columns(source, delimited::parse(source, decode(source, bytes)?, options)?)
    }

    /// Reads an ARFF file from memory; `source` names it in messages.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when a cell is not one of the declared values.
    pub fn from_arff(source: &str, bytes: &[u8]) -> Result<Self> {
        Self::from_columns(source, arff::parse(source, decode(source, bytes)?)?)
    }

    /// A table of these columns; `source` names it in messages.
    ///
    /// # Errors
    /// When there is no column or no row, columns differ in length, or two have one name.
    pub fn from_columns(source: &str, columns: Vec<Column>) -> Result<Self> {
        let wrong = |found: String| Error::input(source, found);
        let rows = columns.first().ok_or_else(|| wrong("has no columns".into()))?.len();
        for (number, column) in columns.iter().enumerate() {
            if column.len() != rows {
                let found = format!("column \"{}\" has {} rows, must have {rows}", column.name, column.len());
                return Err(wrong(found));
            }
            if let Some(first) = columns[..number].iter().position(|other| other.name == column.name) {
                let found =
                    format!("columns {} and {} are both named \"{}\"", first + 1, number + 1, column.name);
                return Err(wrong(found).hint("columns are told apart by their names: rename one"));
            }
        }
        if rows == 0 {
            return Err(wrong("holds column names but no rows".into()));
        }
        Ok(Self { source: source.into(), rows, columns })
    }

    /// What the table is called in messages.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The columns in the order of the file.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The column of this name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// Takes the column of this name out of the table.
    ///
    /// # Errors
    /// When there is none; the message lists those that are there.
    pub fn take(&mut self, name: &str) -> Result<Column> {
        match self.columns.iter().position(|column| column.name == name) {
            Some(place) => Ok(self.columns.remove(place)),
            None => Err(self.no_column(name)),
        }
    }

    /// That there is no column of this name.
    pub fn no_column(&self, name: &str) -> Error {
        const SHOWN: usize = 20;
        let names: Vec<&str> = self.columns.iter().map(|column| column.name.as_str()).take(SHOWN).collect();
        let more = match self.columns.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Error::input(&self.source, format!("has no column \"{name}\""))
            .hint(format!("its columns are {}{more}", names.join(", ")))
    }

    /// These rows, in this order.
    pub fn select(&self, rows: &[usize]) -> Self {
        let columns = self.columns.iter().map(|column| column.select(rows)).collect();
        Self { source: self.source.clone(), rows: rows.len(), columns }
    }

    /// Writes the table as CSV (as TSV where the name ends in `.tsv`), atomically; missing cells are empty.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let tabs = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tsv"));
        write_atomic(path, &self.to_text(if tabs { b'\t' } else { b',' }))
    }

    /// The table as lines of cells between `separator`.
    pub fn to_text(&self, separator: u8) -> Vec<u8> {
        let mut writer = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
        let lines = std::iter::once(None).chain((0..self.rows).map(Some));
        for line in lines {
            let cells = self.columns.iter().map(|column| match line {
                None => column.name.clone(),
                Some(row) => column.text(row).unwrap_or_default(),
            });
            writer.write_record(cells).expect("memory takes every record of one length");
        }
        writer.into_inner().expect("memory can be flushed")
    }
}

/// Text from bytes: a mark of byte order is dropped, other codings than UTF-8 are named.
fn decode<'a>(source: &str, bytes: &'a [u8]) -> Result<&'a str> {
    let as_utf8 = "save the file as UTF-8 (in a spreadsheet: \"CSV UTF-8\")";
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(Error::input(source, "is coded as UTF-16").hint(as_utf8));
    }
    if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(&[0x1F, 0x8B]) {
        return Err(Error::input(source, "is a packed file or a spreadsheet, not text")
            .hint("export the table as CSV; a gzipped file must end in .gz"));
    }
    let bytes = bytes.strip_prefix("\u{FEFF}".as_bytes()).unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = 1 + bytes[..e.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        Error::input(format!("{source}, line {line}"), "is not UTF-8 text").hint(as_utf8)
    })?;
    if text.trim().is_empty() {
        return Err(Error::input(source, "is empty").hint("give a file with column names and rows"));
    }
    Ok(text)
}

fn is_missing(cell: &str) -> bool {
    MISSING.contains(&cell)
}

/// Numbers words in the order of their first appearance.
#[derive(Default)]
struct Distinct {
    words: Vec<String>,
    numbers: std::collections::HashMap<String, u32>,
}

impl Distinct {
    fn number(&mut self, word: &str) -> u32 {
        if let Some(&number) = self.numbers.get(word) {
            return number;
        }
        let number = u32::try_from(self.words.len()).expect("a table of 2 GiB has fewer words than 2^32");
        self.words.push(word.into());
        self.numbers.insert(word.into(), number);
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn table(text: &str) -> Table {
        Table::from_text("t.csv", text.as_bytes(), TableOptions::default()).unwrap()
    }

    fn refusal(text: &str) -> String {
        let error = Table::from_text("t.csv", text.as_bytes(), TableOptions::default()).unwrap_err();
        format!("{error}; {}", error.hint_text().unwrap_or("no hint"))
    }

    #[test]
    fn separators_quotes_line_ends_and_marks_of_byte_order_make_no_difference() {
        let plain = table("a,b,c\n1,x,2.5\n-3e2,\"y,z\",\n");
        assert_eq!(plain.rows(), 2);
        assert_eq!(plain.columns()[0], Column::numbers("a", vec![1.0, -300.0]));
        assert_eq!(plain.columns()[1], Column::words("b", [Some("x"), Some("y,z")]));
        assert_eq!((plain.columns()[2].missing(), plain.columns()[2].text(0)), (1, Some("2.5".into())));
        for text in [
            "\u{FEFF}a,b,c\r\n1,x,2.5\r\n-3e2,\"y,z\",\r\n",
            "a;b;c\n1;x;2.5\n-3e2;y,z;\n",
            "\"a\"\tb\tc\n 1 \tx\t2.5\n-3e2\ty,z\tNA",
            "a,b,c\n1,x,2.5\n\n-3e2,\"y,z\",?\n",
        ] {
            assert_eq!(table(text).columns()[..2], plain.columns()[..2], "{text}");
            assert_eq!(table(text).columns()[2].missing(), 1, "{text}");
        }
    }

    #[test]
    fn every_usual_sign_of_a_missing_value_is_one() {
        let cells =
            ["", "?", "NA", "N/A", "nan", "NaN", "null", "NULL", "None"].map(|cell| format!("{cell},1"));
        assert_eq!(table(&format!("a,b\n{}\n", cells.join("\n"))).columns()[0].missing(), 9);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_a_way_out() {
        for (text, words) in [
            ("", "t.csv: is empty"),
            (" \n", "t.csv: is empty"),
            ("a,b\n", "no rows"),
            ("a,b\n1,2\n3\n", "t.csv, line 3: has 1 cell, the header has 2"),
            ("a,b\n1,2\n3,4,5\n", "line 3: has 3 cells, the header has 2"),
            ("a,b\n\"1\n,2\",3\n4\n", "line 4: has 1 cell"),
            ("a,\"b\n1,2\n", "a double quote is not closed"),
            (
                "a,b\n1,2\n\"3,4\n5,6\n",
                "line 3: has 1 cell, the header has 2; a cell goes on in the next line",
            ),
            ("a,b,a\n1,2,3\n", "columns 1 and 3 are both named \"a\""),
            ("a,b\n1,inf\n", "line 2, column \"b\": is infinite"),
            ("a,b\n1,1e999\n", "line 2, column \"b\": is infinite"),
            ("a;b\n1,5;2\n2,25;3\n", "line 2, column \"a\": \"1,5\" has a decimal comma"),
            ("1.5,2\n3,4\n", "line 1: holds only numbers"),
        ] {
            assert!(refusal(text).contains(words), "{text:?} gave: {}", refusal(text));
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_named() {
        let options = TableOptions::default();
        for (bytes, words) in [
            (&b"a,b\n1,\xFF\n"[..], "line 2: is not UTF-8"),
            (&b"\xFF\xFEa\0"[..], "UTF-16"),
            (&b"PK\x03\x04..."[..], "a spreadsheet"),
        ] {
            let error = Table::from_text("t", bytes, options).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn decimal_commas_are_read_when_told() {
        let options = TableOptions { decimal_comma: true };
        let table = Table::from_text("t", b"a;b\n1,5;x\n-2;y\n", options).unwrap();
        assert_eq!(table.columns()[0], Column::numbers("a", vec![1.5, -2.0]));
    }

    #[test]
    fn numbered_columns_are_a_header_and_nameless_ones_get_a_name() {
        assert_eq!(table("0,1,2\n5,6,7\n").columns()[2].name, "2");
        assert_eq!(table(",a\n5,6\n").columns()[0].name, "column 1");
    }

    #[test]
    fn a_word_among_many_numbers_is_noticed() {
        let numbers: String = (0..30).map(|i| format!("{i}\n")).collect();
        assert_eq!(table(&format!("a\n{numbers}3..5\n")).columns()[0].stray_word(), Some("3..5"));
        assert_eq!(table("a\n1\nx\n").columns()[0].stray_word(), None);
    }

    #[test]
    fn packed_files_are_unpacked_and_damaged_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.csv.gz");
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(b"a,b\n1,2\n").unwrap();
        let packed = packer.finish().unwrap();
        std::fs::write(&path, &packed).unwrap();
        assert_eq!(Table::read(&path, TableOptions::default()).unwrap().rows(), 1);
        std::fs::write(&path, &packed[..packed.len() / 2]).unwrap();
        let error = Table::read(&path, TableOptions::default()).unwrap_err().to_string();
        assert!(error.contains("t.csv.gz: cannot be unpacked"), "{error}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let original = table("a,b\n1.25,\"x, \"\"y\"\"\"\n,z\n0.1,\n");
        for name in ["t.csv", "t.tsv"] {
            let path = folder.path().join(name);
            original.write(&path).unwrap();
            let back = Table::read(&path, TableOptions::default()).unwrap();
            assert_eq!(back.columns()[1], original.columns()[1]);
            assert_eq!((back.columns()[0].text(0), back.columns()[0].text(1)), (Some("1.25".into()), None));
        }
    }
}
