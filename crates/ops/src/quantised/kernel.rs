//! Tiles of a product of bytes: some rows, four bytes of which are read at once, times panels of sixteen columns.

use std::sync::OnceLock;

use crate::simd::LEVEL_VARIABLE;

/// Columns of a panel.
pub const PANEL: usize = 16;

/// Bytes of a row that meet in one 32-bit lane.
pub const GROUP: usize = 4;

/// Most rows of a tile.
const MOST_ROWS: usize = 12;

/// Most columns of a tile.
const MOST_COLUMNS: usize = 4 * PANEL;

/// Which instructions sum products of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// No special ones.
    Portable,
    /// AVX2: pairs of 16-bit products.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with VNNI: four products of bytes.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Level {
    /// All that this machine has, the fastest last.
    pub fn available() -> Vec<Self> {
        let levels = [
            (Self::Portable, true),
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, is_x86_feature_detected!("avx2")),
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bw")),
        ];
        levels.into_iter().filter(|(_, there)| *there).map(|(level, _)| level).collect()
    }

    /// Rows of a tile, from many to one.
    fn row_steps(self) -> &'static [usize] {
        match self {
            Self::Portable => &[4, 1],
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &[4, 2, 1],
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => &[12, 6, 3, 1],
        }
    }

    /// Panels of a tile, from many to one, for a product of `rows` rows.
    fn panel_steps(self, rows: usize) -> &'static [usize] {
        // Few rows leave registers for more columns.
        let few = rows < MOST_ROWS;
        match (self, few) {
            (Self::Portable, _) => &[1],
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, _) => &[1],
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, true) => &[4, 2, 1],
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, false) => &[2, 1],
        }
    }
}

/// The fastest level of this machine, or what the environment variable [`LEVEL_VARIABLE`] allows.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let levels = Level::available();
        let most = match std::env::var(LEVEL_VARIABLE).as_deref() {
            Ok("scalar") => 1,
            Ok("avx2") => 2,
            _ => levels.len(),
        };
        levels[most.min(levels.len()) - 1]
    })
}

/// Which operand is unsigned, and how panels are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Unsigned rows, panels of signed bytes.
    Signed,
    /// Unsigned rows, panels of signed numbers of four bits.
    Nibbles,
    /// Signed rows, panels of unsigned bytes.
    Unsigned,
}

impl Kind {
    /// Bytes that a panel takes a group.
    pub fn group_bytes(self) -> usize {
        match self {
            Self::Nibbles => PANEL * GROUP / 2,
            _ => PANEL * GROUP,
        }
    }
}

/// The operands of a block of a product. Row `r` begins at `r stride` of `rows` and has `groups` groups; a panel is
/// `groups` times [`Kind::group_bytes`] long, and has for every group the four bytes of each column.
#[derive(Debug, Clone, Copy)]
pub struct Block<'a> {
    pub kind: Kind,
    pub rows: &'a [u8],
    pub row_count: usize,
    pub stride: usize,
    pub groups: usize,
    pub panels: &'a [u8],
    pub panel_count: usize,
}

/// Sums of a tile, row after row.
type Tile = [i32; MOST_ROWS * MOST_COLUMNS];

/// Hands `write` every row's sums, some columns at a time: the row, the first column, the sums.
#[inline]
pub fn multiply(level: Level, block: &Block<'_>, mut write: impl FnMut(usize, usize, &[i32])) {
    let Block { kind, rows, row_count, stride, groups, panels, panel_count } = *block;
    let panel_bytes = groups * kind.group_bytes();
    assert!(stride >= groups * GROUP && panels.len() >= panel_count * panel_bytes);
    assert!(row_count == 0 || rows.len() >= (row_count - 1) * stride + groups * GROUP);
    let mut tile = [0; MOST_ROWS * MOST_COLUMNS];
    let mut panel = 0;
    for &panels_at_once in level.panel_steps(row_count) {
        while panel_count - panel >= panels_at_once {
            let mut row = 0;
            for &rows_at_once in level.row_steps() {
                if rows_at_once * panels_at_once > MOST_ROWS * 2 {
                    continue;
                }
                while row_count - row >= rows_at_once {
                    let job = Job {
                        rows: &rows[row * stride..],
                        stride,
                        groups,
                        panels: &panels[panel * panel_bytes..],
                    };
                    sum(level, kind, (rows_at_once, panels_at_once), job, &mut tile);
                    let columns = panels_at_once * PANEL;
                    for (r, sums) in tile.chunks(columns).take(rows_at_once).enumerate() {
                        write(row + r, panel * PANEL, sums);
                    }
                    row += rows_at_once;
                }
            }
            panel += panels_at_once;
        }
    }
}

/// Rows and panels from the first of a tile on.
#[derive(Clone, Copy)]
struct Job<'a> {
    rows: &'a [u8],
    stride: usize,
    groups: usize,
    panels: &'a [u8],
}

fn sum(level: Level, kind: Kind, tile_size: (usize, usize), job: Job<'_>, tile: &mut Tile) {
    /// One arm a size of tile and kind.
    #[cfg(target_arch = "x86_64")]
    macro_rules! by_size {
        ($function:ident: $(($rows:literal, $panels:literal)),+) => {
            match (tile_size, kind) {
                $((($rows, $panels), Kind::Signed) => $function::<$rows, $panels, SIGNED>(job, tile),
                (($rows, $panels), Kind::Nibbles) => $function::<$rows, $panels, NIBBLES>(job, tile),
                (($rows, $panels), Kind::Unsigned) => $function::<$rows, $panels, UNSIGNED>(job, tile),)+
                _ => unreachable!("no kernel for a tile of {tile_size:?}"),
            }
        };
    }
    match level {
        Level::Portable => portable(kind, tile_size, job, tile),
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        // SAFETY: `Level::available` found AVX2. `multiply` has checked that the rows and panels of the whole block are
        // there, and a tile lies within it.
        Level::Avx2 => unsafe { by_size!(avx2: (4, 1), (2, 1), (1, 1)) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        // SAFETY: `Level::available` found AVX-512 with BW and VNNI. `multiply` has checked that the rows and panels of
        // the whole block are there, and a tile lies within it.
        Level::Vnni => unsafe {
            by_size!(vnni: (12, 2), (6, 2), (3, 2), (1, 2), (12, 1), (6, 1), (3, 1), (1, 1), (6, 4), (3, 4), (1, 4));
        },
    }
}

fn portable(kind: Kind, (rows, panels): (usize, usize), job: Job<'_>, tile: &mut Tile) {
    let group_bytes = kind.group_bytes();
    let columns = panels * PANEL;
    tile[..rows * columns].fill(0);
    for panel in 0..panels {
        for group in 0..job.groups {
            let stored = &job.panels[(panel * job.groups + group) * group_bytes..][..group_bytes];
            let mut bytes = [0u8; PANEL * GROUP];
            match kind {
                Kind::Nibbles => {
                    for (pair, &byte) in bytes.chunks_mut(2).zip(stored) {
                        pair[0] = ((byte << 4) as i8 >> 4) as u8;
                        pair[1] = (byte as i8 >> 4) as u8;
                    }
                }
                _ => bytes.copy_from_slice(stored),
            }
            for row in 0..rows {
                let quad = &job.rows[row * job.stride + group * GROUP..][..GROUP];
                let sums = &mut tile[row * columns + panel * PANEL..][..PANEL];
                for (sum, column) in sums.iter_mut().zip(bytes.chunks(GROUP)) {
                    for (&a, &b) in quad.iter().zip(column) {
                        let (unsigned, signed) = if kind == Kind::Unsigned { (b, a) } else { (a, b) };
                        *sum += i32::from(unsigned) * i32::from(signed as i8);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
const SIGNED: u8 = 0;
#[cfg(target_arch = "x86_64")]
const NIBBLES: u8 = 1;
#[cfg(target_arch = "x86_64")]
const UNSIGNED: u8 = 2;

/// The four bytes of row `row` in group `group`, as one number.
///
/// # Safety
/// They must lie within the rows.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn quad(job: &Job<'_>, row: usize, group: usize) -> i32 {
    // SAFETY: promised by the caller; the read may be unaligned.
    unsafe { job.rows.as_ptr().add(row * job.stride + group * GROUP).cast::<i32>().read_unaligned() }
}

/// Sums of four products of bytes in every 32-bit lane.
///
/// # Safety
/// The machine must have AVX-512 with BW and VNNI, and the rows and panels of the tile must be there.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn vnni<const ROWS: usize, const PANELS: usize, const KIND: u8>(job: Job<'_>, tile: &mut Tile) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_si512(); PANELS]; ROWS];
    let group_bytes = if KIND == NIBBLES { PANEL * GROUP / 2 } else { PANEL * GROUP };
    for group in 0..job.groups {
        let mut columns = [_mm512_setzero_si512(); PANELS];
        for (panel, column) in columns.iter_mut().enumerate() {
            // SAFETY: the caller promises that the panels are there; loads may be unaligned.
            *column = unsafe {
                let stored = job.panels.as_ptr().add((panel * job.groups + group) * group_bytes);
                if KIND == NIBBLES {
                    // 0x00HL becomes 0x0H0L, and each half is extended from four bits to eight.
                    let wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(stored.cast()));
                    let spread = _mm512_or_si512(wide, _mm512_slli_epi16::<4>(wide));
                    let nibbles = _mm512_and_si512(spread, _mm512_set1_epi8(0x0f));
                    let eight = _mm512_set1_epi8(8);
                    _mm512_sub_epi8(_mm512_xor_si512(nibbles, eight), eight)
                } else {
                    _mm512_loadu_si512(stored.cast())
                }
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller promises that the rows are there.
            let quad = _mm512_set1_epi32(unsafe { quad(&job, row, group) });
            for (sum, &column) in sums.iter_mut().zip(&columns) {
                *sum = if KIND == UNSIGNED {
                    _mm512_dpbusd_epi32(*sum, column, quad)
                } else {
                    _mm512_dpbusd_epi32(*sum, quad, column)
                };
            }
        }
    }
    for (sums, out) in sums.iter().zip(tile.chunks_exact_mut(PANELS * PANEL)) {
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(PANEL)) {
            // SAFETY: the chunk has sixteen elements; the store may be unaligned.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sum) };
        }
    }
}

/// Even and odd bytes are widened to 16 bits and multiplied in pairs, which cannot overflow.
///
/// # Safety
/// The machine must have AVX2, and the rows and panels of the tile must be there.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[target_feature(enable = "avx2")]
unsafe fn avx2<const ROWS: usize, const PANELS: usize, const KIND: u8>(job: Job<'_>, tile: &mut Tile) {
    use std::arch::x86_64::*;
    const { assert!(PANELS == 1, "two vectors hold one panel") };
    let mut sums = [[_mm256_setzero_si256(); 2]; ROWS];
    let low_bytes = _mm256_set1_epi16(0xff);
    let group_bytes = if KIND == NIBBLES { PANEL * GROUP / 2 } else { PANEL * GROUP };
    for group in 0..job.groups {
        let mut columns = [[_mm256_setzero_si256(); 2]; 2]; // even and odd bytes of each half of the panel
        for (half, column) in columns.iter_mut().enumerate() {
            // SAFETY: the caller promises that the panels are there; loads may be unaligned.
            *column = unsafe {
                let stored = job.panels.as_ptr().add(group * group_bytes + half * group_bytes / 2);
                if KIND == NIBBLES {
                    let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(stored.cast()));
                    [
                        _mm256_srai_epi16::<12>(_mm256_slli_epi16::<12>(wide)),
                        _mm256_srai_epi16::<12>(_mm256_slli_epi16::<8>(wide)),
                    ]
                } else {
                    let bytes = _mm256_loadu_si256(stored.cast());
                    if KIND == UNSIGNED {
                        [_mm256_and_si256(bytes, low_bytes), _mm256_srli_epi16::<8>(bytes)]
                    } else {
                        [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes)), _mm256_srai_epi16::<8>(bytes)]
                    }
                }
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller promises that the rows are there.
            let quad = _mm256_set1_epi32(unsafe { quad(&job, row, group) });
            let [even, odd] = if KIND == UNSIGNED {
                [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quad)), _mm256_srai_epi16::<8>(quad)]
            } else {
                [_mm256_and_si256(quad, low_bytes), _mm256_srli_epi16::<8>(quad)]
            };
            for (sum, column) in sums.iter_mut().zip(&columns) {
                let pairs =
                    _mm256_add_epi32(_mm256_madd_epi16(even, column[0]), _mm256_madd_epi16(odd, column[1]));
                *sum = _mm256_add_epi32(*sum, pairs);
            }
        }
    }
    for (sums, out) in sums.iter().zip(tile.chunks_exact_mut(PANEL)) {
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(PANEL / 2)) {
            // SAFETY: the chunk has eight elements; the store may be unaligned.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sum) };
        }
    }
}
