//! A dataset in numbers, for people: facts, sources, a drawn histogram of lengths.

use std::fmt::Write;

use super::style::{Paint, Style, columns, percent, percent_of, thousands};
use super::visible;
use crate::data::stats::{Bin, LengthStats, SourceStats, Stats};

/// Columns of names, as in all facts.
const NAMES: usize = 10;

/// Columns of the longest bar at most.
const LONGEST_BAR: usize = 50;

/// Eighths of a column.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// All there is to tell.
pub fn stats(stats: &Stats, style: Style) -> String {
    let mut out = String::new();
    for (name, value) in facts(stats) {
        out += &fact(name, &value);
    }
    if stats.sources.len() > 1 {
        out.push('\n');
        out += &sources(&stats.sources, style);
    }
    out.push('\n');
    out += &lengths(&stats.lengths, stats.max_seq_len, style);
    out
}

fn fact(name: &str, value: &str) -> String {
    format!("{name:>NAMES$}  {value}\n")
}

/// Names and values, in the order of reading.
fn facts(stats: &Stats) -> Vec<(&'static str, String)> {
    let format = visible::line(&stats.format);
    let rows = match &stats.sources[..] {
        [one] => format!("{format}, {}", visible::line(&one.path)),
        many => format!("{format}, {} sources", many.len()),
    };
    let held_out = match stats.validation_samples {
        0 => String::new(),
        n => format!(", {} held out", thousands(n)),
    };
    let mut facts = vec![
        ("rows", format!("{}  ({rows})", thousands(stats.rows))),
        (
            "samples",
            format!("{} to train on{held_out}", thousands(stats.samples)),
        ),
    ];
    facts.push(("of these", losses(stats)));
    facts.push((
        "tokens",
        format!(
            "{}, {} trained ({})",
            thousands(stats.tokens),
            thousands(stats.trained_tokens),
            percent_of(stats.trained_tokens, stats.tokens)
        ),
    ));
    facts.push(("packing", packing(stats)));
    facts.push((
        "steps",
        format!(
            "{} an epoch, {} in all",
            thousands(stats.steps_per_epoch),
            thousands(stats.steps)
        ),
    ));
    let how = if stats.cached {
        "from the cache"
    } else {
        "tokenised"
    };
    facts.push(("time", format!("{:.1} s, {how}", stats.seconds)));
    facts
}

/// What happened to some rows.
fn losses(stats: &Stats) -> String {
    let counts = [
        (stats.bad_rows, stats.rows, "bad"),
        (stats.dropped, stats.rows, "dropped"),
        (stats.unlabelled, stats.rows, "with nothing to train"),
        (stats.truncated, stats.samples, "truncated"),
        (stats.duplicates, stats.samples, "duplicates"),
    ];
    let some = counts.iter().filter(|(count, ..)| *count > 0);
    let texts: Vec<_> = some
        .map(|(count, whole, what)| {
            format!(
                "{} {what} ({})",
                thousands(*count),
                percent_of(*count, *whole)
            )
        })
        .collect();
    if texts.is_empty() {
        return "none bad, dropped, truncated or duplicate".to_owned();
    }
    texts.join(", ")
}

fn packing(stats: &Stats) -> String {
    format!(
        "{}, {} rows of up to {} tokens an epoch, {} filled, {} padding",
        visible::line(&stats.packing),
        thousands(stats.rows_per_epoch),
        thousands(stats.max_seq_len),
        percent(stats.fill),
        percent(stats.padding_share)
    )
}

/// A table of the sources, numbers to the right.
fn sources(sources: &[SourceStats], style: Style) -> String {
    let titles = [
        "source", "format", "weight", "rows", "samples", "tokens", "share",
    ];
    let tokens: usize = sources.iter().map(|source| source.tokens).sum();
    let rows: Vec<[String; 7]> = sources
        .iter()
        .map(|source| {
            [
                visible::line(&source.path),
                visible::line(&source.format),
                source.weight.to_string(),
                thousands(source.rows),
                thousands(source.samples),
                thousands(source.tokens),
                percent_of(source.tokens, tokens),
            ]
        })
        .collect();
    let width = |i: usize| {
        let cells = rows.iter().map(|row| columns(&row[i]));
        cells.max().unwrap_or(0).max(columns(titles[i]))
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut out = style.paint(Paint::Heading, &table_line(&titles, &widths));
    out.push('\n');
    for row in &rows {
        out += &table_line(row, &widths);
        out.push('\n');
    }
    out
}

/// Cells side by side; the first two are words, the others numbers.
fn table_line<S: AsRef<str>>(cells: &[S], widths: &[usize]) -> String {
    let mut line = String::new();
    for (i, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let cell = cell.as_ref();
        let space = " ".repeat(width - columns(cell));
        let gap = if i == 0 { "" } else { "  " };
        line += gap;
        line += &if i < 2 {
            format!("{cell}{space}")
        } else {
            format!("{space}{cell}")
        };
    }
    line.trim_end().to_owned()
}

/// The histogram under its numbers, with a line where rows end.
fn lengths(lengths: &LengthStats, max_seq_len: usize, style: Style) -> String {
    let numbers = format!(
        "min {}  mean {:.1}  median {}  p95 {}  p99 {}  max {}",
        thousands(lengths.min),
        lengths.mean,
        thousands(lengths.median),
        thousands(lengths.p95),
        thousands(lengths.p99),
        thousands(lengths.max)
    );
    let mut out = fact("lengths", &numbers);
    if lengths.bins.is_empty() {
        return out;
    }
    let cells: Vec<_> = lengths.bins.iter().map(cells).collect();
    let widest = |i: usize| cells.iter().map(|c| columns(&c[i])).max().unwrap_or(0);
    let (ranges, counts) = (widest(0).max(NAMES), widest(1));
    let most = lengths.bins.iter().map(|bin| bin.count).max().unwrap_or(0);
    let bar_width = style.width.saturating_sub(ranges + counts + 5);
    let bar_width = bar_width.clamp(1, LONGEST_BAR);
    let marker = marker(max_seq_len, ranges, counts + bar_width + 2, style);
    let end = lengths.bins.iter().position(|bin| bin.to > max_seq_len);
    for (i, bin) in lengths.bins.iter().enumerate() {
        if end == Some(i) {
            out += &marker;
        }
        let [range, count] = &cells[i];
        let bar = bar(bin.count, most, bar_width);
        let line = format!("{range:>ranges$}  {count:>counts$}  {bar}");
        let _ = writeln!(out, "{}", line.trim_end());
    }
    if end.is_none() {
        out += &marker;
    }
    out
}

/// The lengths and the count of a bar.
fn cells(bin: &Bin) -> [String; 2] {
    let range = match (bin.from, bin.to) {
        (from, to) if from >= to => thousands(to),
        (from, to) => format!("{}–{}", thousands(from), thousands(to)),
    };
    [range, thousands(bin.count)]
}

/// A bar in eighths of a column; the least that is not nothing shows.
fn bar(count: usize, most: usize, width: usize) -> String {
    let share = count as f64 / most.max(1) as f64;
    let eighths = (share * (width * 8) as f64).round() as usize;
    let eighths = if count > 0 { eighths.max(1) } else { 0 };
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

/// The line between lengths that fit and those that do not.
fn marker(max_seq_len: usize, names: usize, width: usize, style: Style) -> String {
    let value = thousands(max_seq_len);
    let text = format!("╌╌ max_seq_len {value} ");
    let rest = "╌".repeat(width.saturating_sub(columns(&text)));
    let line = style.paint(Paint::Notice, &(text + &rest));
    format!("{:>names$}  {line}\n", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style = Style {
        color: false,
        width: 60,
    };

    fn bin(from: usize, to: usize, count: usize) -> Bin {
        Bin { from, to, count }
    }

    fn source(path: &str, tokens: usize, weight: f64) -> SourceStats {
        SourceStats {
            path: path.to_owned(),
            rows: 1_234,
            samples: 1_200,
            tokens,
            weight,
            format: "messages".to_owned(),
        }
    }

    fn sample() -> Stats {
        Stats {
            rows: 12_345,
            samples: 12_000,
            validation_samples: 300,
            tokens: 4_567_890,
            trained_tokens: 1_141_972,
            bad_rows: 3,
            dropped: 0,
            unlabelled: 0,
            truncated: 42,
            duplicates: 5,
            format: "messages".to_owned(),
            sources: vec![
                source("data/a.jsonl", 3_000_000, 1.0),
                source("hf://o/名", 1_567_890, 0.5),
            ],
            lengths: LengthStats {
                min: 12,
                mean: 380.66,
                median: 350,
                p95: 900,
                p99: 1_400,
                max: 2_048,
                bins: vec![
                    bin(1, 512, 9_000),
                    bin(513, 1_024, 2_958),
                    bin(1_025, 1_536, 0),
                    bin(1_537, 2_048, 42),
                ],
            },
            max_seq_len: 1_024,
            packing: "on".to_owned(),
            rows_per_epoch: 4_500,
            fill: 0.9912,
            padding_share: 0.0088,
            steps_per_epoch: 282,
            steps: 846,
            cached: true,
            seconds: 0.42,
        }
    }

    #[test]
    fn all_there_is() {
        let expected = "      rows  12,345  (messages, 2 sources)
   samples  12,000 to train on, 300 held out
  of these  3 bad (<0.1 %), 42 truncated (0.4 %), 5 duplicates (<0.1 %)
    tokens  4,567,890, 1,141,972 trained (25.0 %)
   packing  on, 4,500 rows of up to 1,024 tokens an epoch, 99.1 % filled, 0.9 % padding
     steps  282 an epoch, 846 in all
      time  0.4 s, from the cache

source        format    weight   rows  samples     tokens   share
data/a.jsonl  messages       1  1,234    1,200  3,000,000  65.7 %
hf://o/名     messages     0.5  1,234    1,200  1,567,890  34.3 %

   lengths  min 12  mean 380.7  median 350  p95 900  p99 1,400  max 2,048
      1–512  9,000  ███████████████████████████████████████
  513–1,024  2,958  ████████████▉
             ╌╌ max_seq_len 1,024 ╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌
1,025–1,536      0
1,537–2,048     42  ▏
";
        assert_eq!(stats(&sample(), PLAIN), expected);
    }

    #[test]
    fn one_source_needs_no_table() {
        let mut one = sample();
        one.sources.truncate(1);
        one.validation_samples = 0;
        (one.bad_rows, one.truncated, one.duplicates) = (0, 0, 0);
        let text = stats(&one, PLAIN);
        assert!(text.contains("12,345  (messages, data/a.jsonl)\n"));
        assert!(text.contains("12,000 to train on\n"));
        assert!(text.contains("of these  none bad") && !text.contains("weight"));
    }

    #[test]
    fn the_marker_stands_behind_bars_that_all_fit() {
        let mut short = sample();
        short.max_seq_len = 4_096;
        let text = stats(&short, PLAIN);
        assert!(text.lines().last().unwrap().contains("max_seq_len 4,096"));
        short.lengths.bins.clear();
        assert!(!stats(&short, PLAIN).contains('╌'));
    }

    #[test]
    fn file_names_do_not_drive_the_terminal() {
        let mut hostile = sample();
        hostile.sources[0].path = "\x1b[2J\n".to_owned();
        assert!(!stats(&hostile, PLAIN).contains('\x1b'));
        let colored = Style {
            color: true,
            ..PLAIN
        };
        assert!(stats(&hostile, colored).contains("\x1b[1msource"));
    }

    #[test]
    fn bars_are_drawn_in_eighths() {
        assert_eq!(bar(0, 10, 4), "");
        assert_eq!(bar(1, 1000, 4), "▏");
        assert_eq!(bar(5, 16, 4), "█▎");
        assert_eq!(bar(16, 16, 4), "████");
        assert_eq!(bar(0, 0, 4), "");
    }
}
