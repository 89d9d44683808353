//! Parameters that a model has in tiles, each in a segment of its own, and files as a whole: how tiles are
//! called, and where their elements lie in the whole.
//!
//! The rows `a..b` of the weight of `lm_head` are the parameter `lm_head.rows_a_b.weight`, and the columns
//! `a..b` of the `n` of that of `down_proj` are `down_proj.columns_a_b_of_n.weight`. Files know
//! `lm_head.weight` and `down_proj.weight` only: tiles are read from there, and
//! [`Trainer::parameters`](crate::Trainer::parameters) and exports give the whole.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// Which tile of a whole; of a matrix, or of a vector, which has rows alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Some rows.
    Rows(Range<usize>),
    /// Some columns, and how many the whole has.
    Columns(Range<usize>, usize),
}

/// As it is in names.
impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Rows(rows) => write!(f, "rows_{}_{}", rows.start, rows.end),
            Self::Columns(columns, all) => write!(f, "columns_{}_{}_of_{all}", columns.start, columns.end),
        }
    }
}

impl Cut {
    fn read(text: &str) -> Option<Self> {
        let range = |text: &str| {
            let (start, end) = text.split_once('_')?;
            Some(start.parse().ok()?..end.parse().ok()?)
                .filter(|range: &Range<usize>| range.start < range.end)
        };
        if let Some(rows) = text.strip_prefix("rows_") {
            return Some(Self::Rows(range(rows)?));
        }
        let (columns, all) = text.strip_prefix("columns_")?.split_once("_of_")?;
        Some(Self::Columns(range(columns)?, all.parse().ok()?))
    }

    /// The dimension along which it is cut.
    pub fn dimension(&self) -> usize {
        match self {
            Self::Rows(_) => 0,
            Self::Columns(..) => 1,
        }
    }

    /// Its first row or column.
    pub fn first(&self) -> usize {
        match self {
            Self::Rows(range) | Self::Columns(range, _) => range.start,
        }
    }
}

/// A parameter of the model, as a tile of one that files know, or as that one itself.
#[derive(Debug, Clone)]
pub(crate) struct Tile<'a> {
    /// Name of the whole.
    pub whole: Cow<'a, str>,
    /// Which tile; none: all of it.
    pub cut: Option<Cut>,
}

impl<'a> Tile<'a> {
    /// The tile that a parameter of a name is.
    pub fn from_name(name: &'a str) -> Self {
        let cut = [".rows_", ".columns_"].iter().find_map(|mark| {
            let start = name.rfind(mark)?;
            let (text, kind) = name[start + 1..].split_once('.')?;
            Some((format!("{}.{kind}", &name[..start]), Cut::read(text)?))
        });
        match cut {
            Some((whole, cut)) => Self { whole: whole.into(), cut: Some(cut) },
            None => Self { whole: name.into(), cut: None },
        }
    }

    /// Where `count` elements from `start` of the tile, which has the shape `shape`, lie in the whole: the
    /// first of each run there, and the run among the elements.
    pub fn runs(
        &self,
        shape: &[usize],
        start: usize,
        count: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        // Elements of a row of the tile and of the whole, and what comes before the tile there.
        let row_elements = shape.get(1..).unwrap_or_default().iter().product::<usize>();
        let (width, all, before) = match &self.cut {
            // All of it is one row.
            None => (usize::MAX, usize::MAX, 0),
            Some(Cut::Rows(rows)) => (usize::MAX, usize::MAX, rows.start * row_elements),
            Some(Cut::Columns(columns, all)) => (columns.len(), *all, columns.start),
        };
        let mut done = 0;
        std::iter::from_fn(move || {
            let (row, column) = ((start + done) / width, (start + done) % width);
            let run = done..done + (width - column).min(count - done);
            done = run.end;
            (!run.is_empty()).then(|| (row * all + before + column, run))
        })
    }

    /// Shape of the whole as far as the tile, of the shape `shape`, knows it: columns and not rows.
    pub fn whole_shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut shape = shape.to_vec();
        if let (Some(Cut::Columns(_, all)), Some(columns)) = (&self.cut, shape.get_mut(1)) {
            *columns = *all;
        }
        shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_which_tile_and_of_what() {
        let tile = |name: &'static str| {
            let Tile { whole, cut } = Tile::from_name(name);
            (whole.into_owned(), cut)
        };
        let weight = "h.0.down.weight".to_owned();
        for cut in [Cut::Rows(0..7), Cut::Columns(7..9, 12)] {
            let name = format!("h.0.down.{cut}.weight");
            let found = Tile::from_name(&name);
            assert_eq!((found.whole.as_ref(), found.cut), (weight.as_str(), Some(cut)));
        }
        assert_eq!(
            tile("down.columns_0_4_of_8.lora_A.weight"),
            ("down.lora_A.weight".into(), Some(Cut::Columns(0..4, 8)))
        );
        for plain in
            ["h.0.down.weight", "rows_1", "a.rows_b_c.weight", "a.rows_3_3.weight", "a.columns_1_2.b"]
        {
            assert_eq!(tile(plain), (plain.into(), None));
        }
    }

    /// Every element of every tile is where the whole has it, also where a run begins and ends within a row.
    #[test]
    fn runs_of_tiles_are_the_whole() {
        let (rows, columns) = (4, 10);
        let tiles = [
            (vec![("w.weight", [4, 10])], 40),
            (vec![("w.rows_0_3.weight", [3, 10]), ("w.rows_3_4.weight", [1, 10])], 40),
            (vec![("w.columns_0_7_of_10.weight", [4, 7]), ("w.columns_7_10_of_10.weight", [4, 3])], 40),
        ];
        for (tiles, elements) in tiles {
            for at_once in [1, 5, elements] {
                let mut found = vec![0; rows * columns];
                for (name, shape) in &tiles {
                    let tile = Tile::from_name(name);
                    let (row, column) = match &tile.cut {
                        None => (0, 0),
                        Some(Cut::Rows(rows)) => (rows.start, 0),
                        Some(Cut::Columns(columns, _)) => (0, columns.start),
                    };
                    let all = shape[0] * shape[1];
                    for start in (0..all).step_by(at_once) {
                        let count = at_once.min(all - start);
                        let mut covered = 0;
                        for (first, run) in tile.runs(shape, start, count) {
                            assert_eq!(run.start, covered);
                            covered = run.end;
                            for (place, element) in (first..).zip(run) {
                                let element = start + element;
                                let (own_row, own_column) = (element / shape[1], element % shape[1]);
                                assert_eq!(place, (row + own_row) * columns + column + own_column);
                                found[place] += 1;
                            }
                        }
                        assert_eq!(covered, count);
                    }
                }
                assert_eq!(found, vec![1; rows * columns], "{tiles:?}, {at_once} at once");
            }
        }
    }
}
