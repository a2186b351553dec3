//! What `top` shows, without a terminal: [`Top`] takes documents and keys and gives lines.
//!
//! Rates are over the last [`WINDOW`] of documents, so that a CP does not make them jump. A source
//! whose counts went back was started again: its rates begin anew.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::status_view::{colour_of, view};
use super::terminal::Look;
use super::words::{count, percent, size, time};
use crate::status::document::{SourceEntry, StatusDocument};
use crate::status::health::HealthWord;
use crate::units::convert::to_u64;
use crate::units::names::SourceName;

/// Over how long rates are taken.
const WINDOW: Duration = Duration::from_secs(5);
/// Lines beside those of the sources: two of the head, an empty one, the columns' names, the foot.
const OTHER_LINES: usize = 5;
/// The longest text to look for.
const FILTER_MAX: usize = 64;

const HEADS: [&str; 9] = [
    "SOURCE",
    "STATE",
    "WRITES/s",
    "VISIBLE/s",
    "LAG",
    "BEHIND",
    "IMAGE AGE",
    "CP",
    "ACKNOWLEDGED",
];
/// Columns that are left out first on a narrow terminal.
const DISPENSABLE: [usize; 5] = [8, 7, 3, 6, 5];

/// What was pressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// To the row so many below; above if negative.
    Move(isize),
    /// To the first row.
    First,
    /// To the last row.
    Last,
    /// All of the selected source; or the text to look for is whole.
    Enter,
    /// Out of what was entered last.
    Back,
    /// Takes a letter of the text back.
    Erase,
    /// A letter.
    Letter(char),
}

/// By what rows are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    State,
    Name,
    Writes,
    Lag,
    Behind,
    Age,
}

impl Order {
    const ALL: [Self; 6] =
        [Self::State, Self::Name, Self::Writes, Self::Lag, Self::Behind, Self::Age];

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|order| *order == self).unwrap_or(0);
        Self::ALL[(at + 1) % Self::ALL.len()]
    }

    /// The column that it is of.
    fn column(self) -> usize {
        match self {
            Self::Name => 0,
            Self::State => 1,
            Self::Writes => 2,
            Self::Lag => 4,
            Self::Behind => 5,
            Self::Age => 6,
        }
    }
}

/// Counts of a source at one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Duration,
    acknowledged: u64,
    visible: u64,
}

/// Bytes a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rates {
    acknowledged: u64,
    visible: u64,
}

/// The whole of it.
#[derive(Debug)]
pub struct Top {
    look: Look,
    document: Option<StatusDocument>,
    samples: BTreeMap<SourceName, VecDeque<Sample>>,
    trouble: Option<String>,
    order: Order,
    reversed: bool,
    selected: Option<SourceName>,
    detail: bool,
    filter: String,
    typing: bool,
}

impl Top {
    /// Nothing was heard yet.
    pub fn new(look: Look) -> Self {
        Self {
            look,
            document: None,
            samples: BTreeMap::new(),
            trouble: None,
            order: Order::State,
            reversed: false,
            selected: None,
            detail: false,
            filter: String::new(),
            typing: false,
        }
    }

    /// Takes a document that was read `at` so long after the begin.
    pub fn take(&mut self, document: StatusDocument, at: Duration) {
        let mut samples = std::mem::take(&mut self.samples);
        for source in document.sources().iter() {
            let mut known = samples.remove(&source.name).unwrap_or_default();
            let (acknowledged, visible) = (source.acknowledged_bytes, source.visible_bytes);
            let back = |last: &Sample| last.acknowledged > acknowledged || last.visible > visible;
            if known.back().is_some_and(back) {
                known.clear();
            }
            known.push_back(Sample { at, acknowledged, visible });
            // The oldest one stays as long as the next is not as old as the window.
            while known.get(1).is_some_and(|next| at.saturating_sub(next.at) >= WINDOW) {
                known.pop_front();
            }
            self.samples.insert(source.name.clone(), known);
        }
        self.document = Some(document);
        self.trouble = None;
    }

    /// Nothing could be read, in words; what was read before stays.
    pub fn failed(&mut self, why: &str) {
        let line = why.lines().next().unwrap_or_default();
        self.trouble = Some(line.to_owned());
    }

    /// Takes a key; `false` if it ends all.
    pub fn press(&mut self, key: Key) -> bool {
        if self.typing {
            match key {
                Key::Letter(letter) if self.filter.len() < FILTER_MAX => self.filter.push(letter),
                Key::Erase => drop(self.filter.pop()),
                Key::Enter => self.typing = false,
                Key::Back => {
                    self.typing = false;
                    self.filter.clear();
                }
                Key::Letter(_) | Key::Move(_) | Key::First | Key::Last => {}
            }
            return true;
        }
        match key {
            Key::Letter('q') => return false,
            Key::Letter('s') => self.order = self.order.next(),
            Key::Letter('r') => self.reversed = !self.reversed,
            Key::Letter('/') => (self.typing, self.detail) = (true, false),
            Key::Letter('j') => self.go(1),
            Key::Letter('k') => self.go(-1),
            Key::Move(by) => self.go(by),
            Key::First => self.go(isize::MIN),
            Key::Last => self.go(isize::MAX),
            Key::Enter => self.detail = self.selected.is_some(),
            Key::Back if self.detail => self.detail = false,
            Key::Back | Key::Erase => self.filter.clear(),
            Key::Letter(_) => {}
        }
        true
    }

    fn go(&mut self, by: isize) {
        let Some(document) = &self.document else { return };
        let all = document.sources();
        let rows = self.rows(&all);
        let Some(last) = rows.len().checked_sub(1) else { return };
        let at =
            self.selected.as_ref().and_then(|name| rows.iter().position(|row| row.name == *name));
        let to = match at {
            // The first key only shows where it is.
            None if by.unsigned_abs() == 1 => 0,
            at => at.unwrap_or(0).saturating_add_signed(by).min(last),
        };
        self.selected = rows.get(to).map(|row| row.name.clone());
    }

    fn rates(&self, source: &SourceName) -> Option<Rates> {
        let known = self.samples.get(source)?;
        let (first, last) = (known.front()?, known.back()?);
        let millis = u64::try_from((last.at - first.at).as_millis()).ok().filter(|ms| *ms > 0)?;
        let rate = |bytes: u64| bytes.saturating_mul(1000) / millis;
        Some(Rates {
            acknowledged: rate(last.acknowledged - first.acknowledged),
            visible: rate(last.visible - first.visible),
        })
    }

    /// What is shown, in order.
    fn rows<'a>(&self, all: &'a [SourceEntry]) -> Vec<&'a SourceEntry> {
        let wanted = |source: &&SourceEntry| source.name.as_str().contains(&self.filter);
        let mut rows: Vec<&SourceEntry> = all.iter().filter(wanted).collect();
        rows.sort_by(|a, b| {
            let order = self.compare(a, b).then_with(|| a.name.cmp(&b.name));
            if self.reversed { order.reverse() } else { order }
        });
        rows
    }

    /// What needs a look comes first.
    fn compare(&self, a: &SourceEntry, b: &SourceEntry) -> Ordering {
        let writes =
            |source: &SourceEntry| self.rates(&source.name).unwrap_or_default().acknowledged;
        // What is not known may be anything.
        let unknown = |value: Option<f64>| value.unwrap_or(f64::INFINITY);
        match self.order {
            Order::State => b.state.word().cmp(&a.state.word()),
            Order::Name => Ordering::Equal,
            Order::Writes => writes(b).cmp(&writes(a)),
            Order::Lag => unknown(b.lag_seconds).total_cmp(&unknown(a.lag_seconds)),
            Order::Behind => behind(b).cmp(&behind(a)),
            Order::Age => unknown(b.image_age_seconds).total_cmp(&unknown(a.image_age_seconds)),
        }
    }

    /// The lines of a screen of that size; none is wider, none more.
    pub fn lines(&self, width: usize, height: usize) -> Vec<String> {
        let body = height.saturating_sub(1);
        let mut lines = match (&self.document, &self.selected) {
            (None, _) => Vec::new(),
            (Some(document), Some(name)) if self.detail => self.detail(document, name, width),
            (Some(document), _) => self.table(document, width, height),
        };
        lines.truncate(body);
        lines.resize(body, String::new());
        lines.push(self.foot(width));
        lines.truncate(height);
        lines
    }

    fn detail(&self, document: &StatusDocument, name: &SourceName, width: usize) -> Vec<String> {
        let columns = u16::try_from(width).unwrap_or(u16::MAX);
        let look = Look { width: Some(columns), colour: false, ..self.look };
        let text = view(document, Some(name), look);
        let mut lines: Vec<String> = text.lines().map(|line| cut(line, width)).collect();
        if let Some(rates) = self.rates(name) {
            let Rates { acknowledged, visible } = rates;
            let line =
                format!("  rates   {}/s written, {}/s visible", size(acknowledged), size(visible));
            lines.push(cut(&line, width));
        }
        lines
    }

    fn table(&self, document: &StatusDocument, width: usize, height: usize) -> Vec<String> {
        let all = document.sources();
        let rows = self.rows(&all);
        let at =
            self.selected.as_ref().and_then(|name| rows.iter().position(|row| row.name == *name));
        let room = height.saturating_sub(OTHER_LINES).max(1);
        // The selected row is in sight, and the page full if it can be.
        let first = at.map_or(0, |at| (at + 1).saturating_sub(room));
        let shown: Vec<&SourceEntry> = rows.iter().skip(first).take(room).copied().collect();
        let cells: Vec<[String; 9]> = shown.iter().map(|source| self.cells(source)).collect();
        let columns = columns(&cells, width);
        let mut lines = self.head(document, &rows, width);
        lines.push(String::new());
        let mut names = HEADS.map(str::to_owned);
        let sorted = &mut names[self.order.column()];
        sorted.push(if self.reversed { '-' } else { '+' });
        lines.push(self.with("1", &row(&names, &columns, width)));
        for (index, (source, cells)) in shown.iter().zip(&cells).enumerate() {
            let text = row(cells, &columns, width);
            let code = match (source.state.word(), at == Some(first + index)) {
                (_, true) => "7",
                (HealthWord::Ok, false) => "0",
                (word, false) => colour_of(word),
            };
            lines.push(self.with(code, &text));
        }
        if rows.is_empty() {
            lines.push(cut("no sources", width));
        }
        lines
    }

    fn head(&self, document: &StatusDocument, rows: &[&SourceEntry], width: usize) -> Vec<String> {
        let health = document.health();
        let whose = match document {
            StatusDocument::Hub(_) => "hub",
            StatusDocument::Source(_) => "source",
        };
        let why =
            health.reasons.first().map_or(String::new(), |reason| format!(": {}", reason.text));
        let first = cut(&format!("{whose}  {}{why}", health.word), width);
        let rates = rows.iter().filter_map(|source| self.rates(&source.name));
        let writes: u64 = rates.map(|rates| rates.acknowledged).sum();
        let mut second = format!("{}, {}/s", count(rows.len(), "source"), size(writes));
        if let Some(nvram) = document.nvram() {
            let used = percent(nvram.used_bytes, nvram.capacity_bytes);
            second.push_str(&format!("   NVRAM {used}% of {}", size(nvram.capacity_bytes)));
        }
        if let Some(pool) = document.pool() {
            let used =
                percent(pool.total_bytes - pool.free_bytes.min(pool.total_bytes), pool.total_bytes);
            second.push_str(&format!("   pool {used}% of {}", size(pool.total_bytes)));
        }
        vec![self.with(colour_of(health.word), &first), cut(&second, width)]
    }

    fn foot(&self, width: usize) -> String {
        let text = match (&self.trouble, self.typing) {
            (_, true) => format!("look for: {}_   enter: done, esc: all", self.filter),
            (Some(trouble), false) => trouble.clone(),
            (None, false) if self.document.is_none() => "asking ...".to_owned(),
            (None, false) if self.detail => "esc: back   q: end".to_owned(),
            (None, false) => {
                let filter = match &*self.filter {
                    "" => String::new(),
                    filter => format!("only '{filter}'   "),
                };
                format!(
                    "{filter}up down: choose  enter: all of it  s: sort  r: turn  /: look for  q: end"
                )
            }
        };
        let code = if self.trouble.is_some() { "1;31" } else { "2" };
        self.with(code, &cut(&text, width))
    }

    fn cells(&self, source: &SourceEntry) -> [String; 9] {
        let unknown = || "-".to_owned();
        let rates = self.rates(&source.name);
        let rate = |of: fn(Rates) -> u64| rates.map_or_else(unknown, |rates| size(of(rates)));
        [
            source.name.to_string(),
            source.state.to_string(),
            rate(|rates| rates.acknowledged),
            rate(|rates| rates.visible),
            source.lag_seconds.map_or_else(unknown, time),
            size(behind(source)),
            source.image_age_seconds.map_or_else(unknown, time),
            source.applied_cp.map_or_else(unknown, |cp| cp.to_string()),
            size(source.acknowledged_bytes),
        ]
    }

    fn with(&self, code: &str, text: &str) -> String {
        // Chosen and not told apart by colour alone: reverse is no colour.
        if self.look.colour || code == "7" {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

fn behind(source: &SourceEntry) -> u64 {
    source.acknowledged_bytes.saturating_sub(source.visible_bytes)
}

/// Which columns there are, and how wide each is.
fn columns(cells: &[[String; 9]], width: usize) -> Vec<(usize, usize)> {
    let widest = |column: usize| {
        let of_cells = cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        // Behind the name there is room for the sign of what it is sorted by.
        of_cells.max(HEADS[column].len() + 1)
    };
    let mut columns: Vec<(usize, usize)> = (0..HEADS.len()).map(|at| (at, widest(at))).collect();
    for dispensable in DISPENSABLE {
        let total: usize = columns.iter().map(|(_, width)| width + 2).sum();
        if total <= width + 2 {
            break;
        }
        columns.retain(|(column, _)| *column != dispensable);
    }
    columns
}

fn row(cells: &[String; 9], columns: &[(usize, usize)], width: usize) -> String {
    let mut text = String::new();
    for (column, wide) in columns {
        let cell = &cells[*column];
        // Words to the left, figures to the right.
        let padded = if *column < 2 { format!("{cell:<wide$}") } else { format!("{cell:>wide$}") };
        text.push_str(&padded);
        text.push_str("  ");
    }
    cut(text.trim_end(), width)
}

/// At most so many letters; none that moves the cursor.
fn cut(text: &str, width: usize) -> String {
    let shown = |letter: char| if letter.is_control() { ' ' } else { letter };
    let short: String = text.chars().take(width).map(shown).collect();
    debug_assert!(to_u64(short.chars().count()) <= to_u64(width), "cut to {width}");
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::document::State;
    use crate::status::document::tests::entry;

    fn documents(parts: &[(&str, State, u64, u64)]) -> StatusDocument {
        let sources = parts.iter().map(|(name, state, acknowledged, visible)| SourceEntry {
            state: *state,
            acknowledged_bytes: *acknowledged,
            visible_bytes: *visible,
            pool_used_bytes: None,
            pool_limit_bytes: None,
            seeds: Vec::new(),
            lag_seconds: Some(if acknowledged > visible { 2.0 } else { 0.0 }),
            name: name.parse().unwrap(),
            ..entry()
        });
        StatusDocument::hub(sources.collect(), None, None)
    }

    fn plain() -> Look {
        Look { tty: true, colour: false, unicode: false, width: None }
    }

    /// The names in their order on the screen.
    fn names(top: &Top) -> Vec<String> {
        let lines = top.lines(120, 40);
        let rows = lines.iter().skip(4).filter(|line| line.contains("filer-"));
        let name = |line: &String| {
            let at = line.find("filer-").unwrap();
            line[at..at + 7].to_owned()
        };
        rows.map(name).collect()
    }

    #[test]
    fn rates_are_over_the_window_and_begin_anew_after_a_restart() {
        let mut top = Top::new(plain());
        let name: SourceName = "filer-a".parse().unwrap();
        let second = Duration::from_secs;
        top.take(documents(&[("filer-a", State::InSync, 1000, 0)]), second(0));
        assert_eq!(top.rates(&name), None, "one document has no rate");
        top.take(documents(&[("filer-a", State::InSync, 3000, 1000)]), second(2));
        assert_eq!(top.rates(&name), Some(Rates { acknowledged: 1000, visible: 500 }));
        top.take(documents(&[("filer-a", State::InSync, 3000, 3000)]), second(20));
        assert_eq!(top.rates(&name), Some(Rates { acknowledged: 0, visible: 111 }));
        top.take(documents(&[("filer-a", State::InSync, 10, 10)]), second(21));
        assert_eq!(top.rates(&name), None);
        top.take(documents(&[]), second(22));
        assert!(top.samples.is_empty(), "what is gone is forgotten");
    }

    #[test]
    fn rows_are_sorted_looked_for_and_chosen() {
        let mut top = Top::new(plain());
        let begin = [
            ("filer-a", State::InSync, 100, 100),
            ("filer-b", State::Offline, 100, 100),
            ("filer-c", State::InSync, 100, 50),
        ];
        top.take(documents(&begin), Duration::ZERO);
        let mut later = begin;
        later[0].2 = 9000;
        later[0].3 = 9000;
        top.take(documents(&later), Duration::from_secs(1));
        assert_eq!(names(&top), ["filer-b", "filer-a", "filer-c"], "worst first");
        let sorted = |top: &mut Top| {
            assert!(top.press(Key::Letter('s')));
            names(top)
        };
        assert_eq!(sorted(&mut top), ["filer-a", "filer-b", "filer-c"], "by name");
        assert_eq!(sorted(&mut top), ["filer-a", "filer-b", "filer-c"], "by writes");
        assert_eq!(sorted(&mut top), ["filer-c", "filer-a", "filer-b"], "by lag");
        assert_eq!(sorted(&mut top)[0], "filer-c", "by what is behind");
        top.press(Key::Letter('r'));
        assert_eq!(names(&top)[2], "filer-c");
        // The choice stays with its source, whatever is sorted.
        top.press(Key::Move(1));
        top.press(Key::Last);
        assert_eq!(top.selected, Some("filer-c".parse().unwrap()));
        top.press(Key::Letter('r'));
        assert_eq!(top.selected, Some("filer-c".parse().unwrap()));
        top.press(Key::Enter);
        let detail = top.lines(100, 30).join("\n");
        assert!(detail.contains("filer-c") && !detail.contains("filer-b"), "{detail}");
        assert!(detail.contains("rates"), "{detail}");
        top.press(Key::Back);
        for letter in "/-b".chars() {
            assert!(top.press(Key::Letter(letter)));
        }
        assert_eq!(names(&top), ["filer-b"]);
        assert!(top.press(Key::Letter('q')), "a letter of the text");
        top.press(Key::Erase);
        top.press(Key::Enter);
        assert!(top.lines(100, 30).last().unwrap().contains("only '-b'"));
        top.press(Key::Back);
        assert_eq!(names(&top).len(), 3);
        assert!(!top.press(Key::Letter('q')));
    }

    #[test]
    fn no_line_is_wider_than_the_screen_and_the_chosen_row_is_in_sight() {
        let mut top = Top::new(plain());
        assert!(top.lines(80, 24).last().unwrap().contains("asking"));
        let names: Vec<String> = (0..300).map(|n| format!("filer-{n:03}")).collect();
        let all: Vec<_> = names.iter().map(|name| (name.as_str(), State::InSync, 7, 7)).collect();
        top.take(documents(&all), Duration::ZERO);
        for steps in [0, 1, 17, 150, 299, 400] {
            top.press(Key::First);
            top.press(Key::Move(steps));
            for (width, height) in [(200, 60), (80, 24), (40, 10), (10, 3), (1, 1)] {
                let lines = top.lines(width, height);
                assert_eq!(lines.len(), height);
                let bare = |line: &String| line.replace("\x1b[7m", "").replace("\x1b[0m", "");
                for line in &lines {
                    assert!(bare(line).chars().count() <= width, "{width}: {line}");
                }
                if height > OTHER_LINES {
                    let chosen = lines.iter().filter(|line| line.contains("\x1b[7m"));
                    assert_eq!(chosen.count(), 1, "{steps} {width}x{height}");
                }
            }
        }
        top.failed("no process answers\nnext: start it");
        let last = top.lines(80, 24).pop().unwrap();
        assert_eq!(last, "no process answers");
        assert!(top.lines(80, 24).join("").contains("filer-"), "what was read stays");
    }
}
