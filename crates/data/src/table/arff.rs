//! The attribute-relation file format of Weka and OpenML.

use kiln_core::{Error, Result};

use super::{Cells, Column, Distinct, is_missing};

/// What an attribute may hold.
enum Kind {
    Number,
    /// Values that the header lists.
    Nominal(Vec<String>),
    /// Any text, dates too.
    Text,
}

struct Attribute {
    name: String,
    kind: Kind,
}

/// The columns of a file.
pub fn parse(source: &str, text: &str) -> Result<Vec<Column>> {
    let wrong = |line: usize, found: String| Error::input(format!("{source}, line {line}"), found);
    let mut lines = (1..)
        .zip(text.lines())
        .map(|(number, line)| (number, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('%'));
    let mut attributes = Vec::new();
    loop {
        let Some((number, line)) = lines.next() else {
            return Err(
                Error::input(source, "has no @data").hint("an ARFF file has @attribute lines, then @data")
            );
        };
        let keyword = line.split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
        match keyword.as_str() {
            "@relation" => {}
            "@attribute" => attributes.push(
                attribute(&line["@attribute".len()..])
                    .ok_or_else(|| wrong(number, "is no attribute with a name and a type".into()))?,
            ),
            "@data" => break,
            _ => return Err(wrong(number, format!("begins with \"{keyword}\", not @attribute or @data"))),
        }
    }

    let mut columns: Vec<Builder> = attributes.iter().map(Builder::new).collect();
    for (number, line) in lines {
        let cells = match line.strip_prefix('{').and_then(|line| line.strip_suffix('}')) {
            Some(sparse) => sparse_row(sparse, &attributes),
            None => Ok(split(line, ',')),
        }
        .map_err(|found| wrong(number, found))?;
        if cells.len() != attributes.len() {
            let found = format!("has {} cells, the header has {} attributes", cells.len(), attributes.len());
            return Err(wrong(number, found).hint("a cell that holds a comma must stand in quotes"));
        }
        for ((column, attribute), cell) in columns.iter_mut().zip(&attributes).zip(&cells) {
            column
                .push(cell)
                .map_err(|found| wrong(number, format!("attribute \"{}\" {found}", attribute.name)))?;
        }
    }
    let named = attributes.into_iter().zip(columns);
    Ok(named.map(|(attribute, column)| Column { name: attribute.name, cells: column.cells() }).collect())
}

/// The name and the type behind `@attribute`.
fn attribute(declaration: &str) -> Option<Attribute> {
    let declaration = declaration.trim();
    let (name, rest) = match declaration.chars().next()? {
        quote @ ('\'' | '"') => declaration[1..].split_once(quote)?,
        _ => declaration.split_once(|c: char| c.is_whitespace() || c == '{')?,
    };
    // The brace of `name{a,b}` was eaten by the split.
    let rest = match rest.trim() {
        rest if rest.ends_with('}') && !rest.starts_with('{') => format!("{{{rest}"),
        rest => rest.to_string(),
    };
    let kind = match rest.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        Some(values) => Kind::Nominal(split(values, ',').into_iter().map(|cell| cell.text).collect()),
        None => match rest.split_whitespace().next()?.to_ascii_lowercase().as_str() {
            "numeric" | "real" | "integer" => Kind::Number,
            "string" | "date" => Kind::Text,
            _ => return None,
        },
    };
    Some(Attribute { name: name.to_string(), kind })
}

/// A cell; quotes make a word even of `?`.
struct Cell {
    text: String,
    quoted: bool,
}

impl Cell {
    fn is_missing(&self) -> bool {
        !self.quoted && is_missing(&self.text)
    }
}

/// The cells of a line, with single or double quotes and backslashes before quotes.
fn split(line: &str, separator: char) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut cell = Cell { text: String::new(), quoted: false };
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(_), '\\') => cell.text.extend(chars.next()),
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => cell.text.push(c),
            (None, '\'' | '"') if cell.text.trim().is_empty() => {
                cell = Cell { text: String::new(), quoted: true };
                quote = Some(c);
            }
            (None, c) if c == separator => {
                cells.push(std::mem::replace(&mut cell, Cell { text: String::new(), quoted: false }));
            }
            (None, c) if cell.quoted && c.is_whitespace() => {}
            (None, c) => cell.text.push(c),
        }
    }
    cells.push(cell);
    for cell in cells.iter_mut().filter(|cell| !cell.quoted) {
        cell.text = cell.text.trim().to_string();
    }
    cells
}

/// The cells of a row that lists only those that are not 0: `{1 x, 3 2.5}`.
fn sparse_row(line: &str, attributes: &[Attribute]) -> Result<Vec<Cell>, String> {
    // What is left out is 0, the first of the listed values.
    let zero = |attribute: &Attribute| match &attribute.kind {
        Kind::Nominal(values) => values.first().cloned().unwrap_or_default(),
        Kind::Number | Kind::Text => "0".into(),
    };
    let mut cells: Vec<Cell> = attributes.iter().map(|a| Cell { text: zero(a), quoted: true }).collect();
    for entry in line.split(',').filter(|entry| !entry.trim().is_empty()) {
        let (place, value) = entry.trim().split_once(char::is_whitespace).unwrap_or((entry.trim(), ""));
        let cell = place.parse::<usize>().ok().and_then(|place| cells.get_mut(place));
        let cell = cell.ok_or_else(|| format!("names the attribute \"{place}\", which is not there"))?;
        *cell = split(value, ',').swap_remove(0);
    }
    Ok(cells)
}

/// A column that grows.
enum Builder {
    Numbers(Vec<f64>),
    Words { distinct: Distinct, codes: Vec<Option<u32>>, closed: bool },
}

impl Builder {
    fn new(attribute: &Attribute) -> Self {
        let mut distinct = Distinct::default();
        match &attribute.kind {
            Kind::Number => Self::Numbers(Vec::new()),
            Kind::Text => Self::Words { distinct, codes: Vec::new(), closed: false },
            Kind::Nominal(values) => {
                for value in values {
                    distinct.number(value);
                }
                Self::Words { distinct, codes: Vec::new(), closed: true }
            }
        }
    }

    fn push(&mut self, cell: &Cell) -> Result<(), String> {
        match self {
            Self::Numbers(numbers) if cell.is_missing() => numbers.push(f64::NAN),
            Self::Numbers(numbers) => match cell.text.parse::<f64>() {
                Ok(number) if number.is_finite() => numbers.push(number),
                _ => return Err(format!("is \"{}\", must be a finite number", cell.text)),
            },
            Self::Words { codes, .. } if cell.is_missing() => codes.push(None),
            Self::Words { distinct, codes, closed } => {
                if *closed && !distinct.numbers.contains_key(&cell.text) {
                    return Err(format!("is \"{}\", which its declaration does not list", cell.text));
                }
                codes.push(Some(distinct.number(&cell.text)));
            }
        }
        Ok(())
    }

    fn cells(self) -> Cells {
        match self {
            Self::Numbers(numbers) => Cells::Numbers(numbers),
            Self::Words { distinct, codes, .. } => Cells::Words { words: distinct.words, codes },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Column, Table};

    const HEAD: &str = "% a comment\n@RELATION r\n@attribute 'the size' NUMERIC\n@attribute colour {red, 'light blue'}\n\
                        @attribute note string\n@data\n";

    fn columns(rows: &str) -> Vec<Column> {
        Table::from_arff("t.arff", format!("{HEAD}{rows}").as_bytes()).unwrap().columns().to_vec()
    }

    #[test]
    fn attributes_quotes_comments_and_missing_cells_are_read() {
        let columns = columns("1.5, 'light blue', \"it's\"\n% more\n?,?,'?'\n");
        assert_eq!(columns[0].name, "the size");
        assert_eq!((columns[0].text(0), columns[0].text(1)), (Some("1.5".into()), None));
        assert_eq!((columns[1].text(0), columns[1].text(1)), (Some("light blue".into()), None));
        assert_eq!((columns[2].text(0), columns[2].text(1)), (Some("it's".into()), Some("?".into())));
    }

    #[test]
    fn listed_values_keep_the_order_of_the_list() {
        let blue_first = columns("1,'light blue',x\n2,red,y\n");
        let super::Cells::Words { words, codes } = &blue_first[1].cells else { panic!("must be words") };
        assert_eq!((words[0].as_str(), codes.as_slice()), ("red", &[Some(1), Some(0)][..]));
    }

    #[test]
    fn what_a_sparse_row_leaves_out_is_zero() {
        let columns = columns("{1 'light blue'}\n{0 2.5, 2 x}\n{}\n");
        assert_eq!(columns[0], Column::numbers("the size", vec![0.0, 2.5, 0.0]));
        assert_eq!(columns[1].text(0).as_deref(), Some("light blue"));
        assert_eq!(columns[1].text(2).as_deref(), Some("red"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (rows, words) in [
            ("1,red\n", "line 7: has 2 cells, the header has 3 attributes"),
            ("1,green,x\n", "line 7: attribute \"colour\" is \"green\", which its declaration does not list"),
            ("x,red,x\n", "attribute \"the size\" is \"x\", must be a finite number"),
            ("{7 1}\n", "names the attribute \"7\""),
        ] {
            let error =
                Table::from_arff("t.arff", format!("{HEAD}{rows}").as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        for (text, words) in
            [("@relation r\n", "has no @data"), ("@attribute a\n@data\n1\n", "line 1: is no attribute")]
        {
            let error = Table::from_arff("t.arff", text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
