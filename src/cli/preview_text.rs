//! A row of the dataset on a terminal: which tokens train, and which do not.
//!
//! Text of a dataset reaches the terminal through [`visible`] alone, so that none of it acts there.
//! [`row`] shows a row as text by turns, [`table`] one token a line, [`legend`] says how to read them.

use std::fmt::Write;

use super::style::{Paint, Style, columns, percent_of, thousands};
use super::turns::{self, PADDING, Turn};
use super::visible;
use crate::data::preview::{PreviewRow, PreviewToken};

/// Columns for roles; `assistant` is the longest.
const GUTTER: usize = 9;

/// Between roles and text.
const RULE: &str = " │ ";

/// Columns that text gets on the narrowest terminal.
const NARROWEST: usize = 20;

/// Around what trains, where there are no colours.
const OPEN: char = '⟦';
const CLOSE: char = '⟧';

/// The line break of a text.
const NEWLINE: &str = "⏎";

/// The tab of a text.
const TAB: &str = "⇥   ";

/// How to read what [`row`] shows.
pub fn legend(style: Style) -> String {
    if style.color {
        format!(
            "{} {} {} {}\n",
            style.paint(Paint::Trained, "trains"),
            style.paint(Paint::Dim, "does not train"),
            style.paint(Paint::Special, "<special token>"),
            style.paint(Paint::Dim, "⏎ line break, ⇥ tab"),
        )
    } else {
        format!("{OPEN}trains{CLOSE} does not train, ⏎ line break, ⇥ tab\n")
    }
}

/// A row as text, its turns named at the left.
pub fn row(row: &PreviewRow, style: Style) -> String {
    let mut out = head(row, style);
    let turns = turns::turns(&row.tokens);
    let mut segment = turns.first().map_or(0, |turn| turn.segment);
    let is_packed = turns.iter().any(|turn| turn.segment != segment);
    for (i, turn) in turns.iter().enumerate() {
        if is_packed && (i == 0 || turn.segment != segment) {
            segment = turn.segment;
            let position = row.tokens[turn.tokens.start].position;
            out += &segment_line(segment, position, style);
        }
        out += &turn_lines(turn, &row.tokens[turn.tokens.clone()], style);
    }
    out
}

/// A row, one token a line. Text is quoted, special tokens are not.
pub fn table(row: &PreviewRow, style: Style) -> String {
    let mut out = head(row, style);
    let titles = format!(
        "{:>6} {:>8} {:>7} {:>7} {:<GUTTER$} {:<6} {}\n",
        "index", "position", "segment", "id", "role", "trains", "token"
    );
    out += &style.paint(Paint::Heading, titles.trim_end());
    out.push('\n');
    for (index, token) in row.tokens.iter().enumerate() {
        let trains = if token.trained { "yes" } else { "" };
        let _ = writeln!(
            out,
            "{index:>6} {:>8} {:>7} {:>7} {:<GUTTER$} {trains:<6} {}",
            token.position,
            token.segment,
            token.id,
            token.role,
            style.paint(paint(token), &quoted(token)),
        );
    }
    out
}

/// Number, source, counts and notes of a row.
fn head(row: &PreviewRow, style: Style) -> String {
    let trained = row.tokens.iter().filter(|t| t.trained).count();
    let total = row.tokens.len();
    let side = row.side.map_or(String::new(), |side| format!("  {side}"));
    let mut out = format!(
        "{}  {}{side}  {} tokens, {} trained ({})\n",
        style.paint(Paint::Heading, &format!("row {}", thousands(row.number))),
        visible::line(&row.source),
        thousands(total),
        thousands(trained),
        percent_of(trained, total),
    );
    for note in &row.notes {
        let note = format!("note: {}", visible::line(note));
        let _ = writeln!(out, "{}", style.paint(Paint::Notice, &note));
    }
    out
}

/// Where another sample of a packed row begins.
fn segment_line(segment: usize, position: usize, style: Style) -> String {
    let name = format!("── segment {segment}, positions from {position} ");
    let rest = style.width.saturating_sub(columns(&name) + 1);
    format!("{}\n", style.paint(Paint::Dim, &(name + &"─".repeat(rest))))
}

/// The lines of a turn, the first one with its role.
fn turn_lines(turn: &Turn, tokens: &[PreviewToken], style: Style) -> String {
    let mut flow = Flow::new(style);
    match tokens {
        // Hundreds of these say nothing more than their number.
        [first, _, ..] if turn.role == PADDING => {
            flow.token(first);
            flow.piece(&format!(" × {}", thousands(tokens.len())), Paint::Dim);
        }
        _ => tokens.iter().for_each(|token| flow.token(token)),
    }
    let mut out = String::new();
    for (i, line) in flow.finish().iter().enumerate() {
        let role = if i == 0 { turn.role } else { "" };
        let role = style.paint(Paint::Heading, &format!("{role:<GUTTER$}"));
        let _ = writeln!(out, "{role}{}{line}", style.paint(Paint::Dim, RULE));
    }
    out
}

fn paint(token: &PreviewToken) -> Paint {
    match (token.trained, token.special) {
        (true, true) => Paint::TrainedSpecial,
        (true, false) => Paint::Trained,
        (false, true) => Paint::Special,
        (false, false) => Paint::Dim,
    }
}

fn trains(look: Paint) -> bool {
    matches!(look, Paint::Trained | Paint::TrainedSpecial)
}

/// A token's text as in source code; without quotes where it is special, a dash where it has none.
fn quoted(token: &PreviewToken) -> String {
    if token.text.is_empty() {
        return "- (part of the character before)".to_owned();
    }
    if token.special {
        return visible::line(&token.text);
    }
    let escaped = token.text.replace('\\', r"\\").replace('"', "\\\"");
    format!("\"{}\"", visible::line(&escaped))
}

/// Text that is broken into lines.
struct Flow {
    style: Style,
    /// Columns for text.
    width: usize,
    lines: Vec<String>,
    line: String,
    /// Columns taken in `line`.
    column: usize,
    /// Text of one look that is not yet in `line`.
    run: String,
    look: Paint,
}

impl Flow {
    fn new(style: Style) -> Self {
        // Two columns for the brackets; the last column stays empty, as some terminals wrap there.
        let width = style.width.saturating_sub(GUTTER + columns(RULE) + 3);
        Self {
            style,
            width: width.max(NARROWEST),
            lines: Vec::new(),
            line: String::new(),
            column: 0,
            run: String::new(),
            look: Paint::Dim,
        }
    }

    /// Appends a token; on a new line where it does not fit on this one but fits on one.
    fn token(&mut self, token: &PreviewToken) {
        let first_line = token.text.split('\n').next().unwrap_or_default();
        let needed = columns(&visible::line(first_line)) + self.brackets(paint(token));
        if needed <= self.width && self.column + needed > self.width {
            self.break_line();
        }
        let look = paint(token);
        let mut escaped = String::new();
        for c in token.text.chars() {
            match c {
                '\n' => {
                    self.piece(NEWLINE, look);
                    self.break_line();
                }
                '\t' => self.piece(TAB, look),
                // Would end what is meant to be shown as trained.
                OPEN | CLOSE if !self.style.color => {
                    self.piece(&c.escape_unicode().to_string(), look);
                }
                _ => {
                    escaped.clear();
                    visible::push(&mut escaped, c);
                    self.piece(&escaped, look);
                }
            }
        }
    }

    /// Appends what must not be broken. A line break's mark has the column that stays free.
    fn piece(&mut self, piece: &str, look: Paint) {
        let mut needed = columns(piece) + self.brackets(look);
        if self.column + needed > self.width && piece != NEWLINE && self.column > 0 {
            self.break_line();
            needed = columns(piece);
        }
        if look != self.look {
            self.end_run();
            self.look = look;
        }
        self.run += piece;
        self.column += needed;
    }

    /// Columns that brackets take if text of such a look comes next. At the beginning of a line
    /// none: they have their own.
    fn brackets(&self, look: Paint) -> usize {
        let opens = trains(look) && !trains(self.look) && self.column > 0;
        if opens && !self.style.color { 2 } else { 0 }
    }

    fn end_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        if run.is_empty() {
            return;
        }
        if self.style.color || !trains(self.look) {
            self.line += &self.style.paint(self.look, &run);
        } else if self.line.ends_with(CLOSE) {
            // Special tokens and text that train stand in the same brackets.
            self.line.pop();
            self.line += &format!("{run}{CLOSE}");
        } else {
            self.line += &format!("{OPEN}{run}{CLOSE}");
        }
    }

    fn break_line(&mut self) {
        self.end_run();
        self.lines.push(std::mem::take(&mut self.line));
        self.column = 0;
    }

    fn finish(mut self) -> Vec<String> {
        self.end_run();
        if !self.line.is_empty() {
            self.lines.push(self.line);
        }
        self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style = Style {
        color: false,
        width: 60,
    };
    const COLORED: Style = Style {
        color: true,
        width: 60,
    };

    fn token(role: &'static str, trained: bool, text: &str) -> PreviewToken {
        PreviewToken {
            id: 7,
            text: text.to_owned(),
            special: text.starts_with("<|"),
            trained,
            role,
            position: 0,
            segment: 0,
        }
    }

    fn of(tokens: Vec<PreviewToken>) -> PreviewRow {
        PreviewRow {
            number: 3,
            source: "data/chat.jsonl:17".to_owned(),
            side: None,
            tokens,
            notes: Vec::new(),
        }
    }

    fn conversation() -> PreviewRow {
        let mut row = of(vec![
            token("template", false, "<|im_start|>"),
            token("template", false, "user"),
            token("template", false, "\n"),
            token("user", false, "Why"),
            token("user", false, "?"),
            token("template", false, "<|im_end|>"),
            token("template", false, "\n"),
            token("template", false, "<|im_start|>"),
            token("template", false, "assistant"),
            token("template", false, "\n"),
            token("assistant", true, "One\n"),
            token("assistant", true, "\tTwo."),
            token("assistant", true, "<|im_end|>"),
            token("template", false, "\n"),
        ]);
        for (position, token) in row.tokens.iter_mut().enumerate() {
            token.position = position;
        }
        row
    }

    #[test]
    fn a_conversation_without_colours() {
        let expected = "\
row 3  data/chat.jsonl:17  14 tokens, 3 trained (21.4 %)
user      │ <|im_start|>user⏎
          │ Why?<|im_end|>⏎
assistant │ <|im_start|>assistant⏎
          │ ⟦One⏎⟧
          │ ⟦⇥   Two.<|im_end|>⟧⏎
";
        assert_eq!(row(&conversation(), PLAIN), expected);
        assert!(legend(PLAIN).starts_with("⟦trains⟧ does not train"));
    }

    #[test]
    fn a_conversation_in_colours() {
        let text = row(&conversation(), COLORED);
        assert!(text.contains("\x1b[36m<|im_start|>\x1b[0m\x1b[2muser⏎\x1b[0m\n"));
        assert!(text.contains("\x1b[38;5;194;48;5;22mOne⏎\x1b[0m\n"));
        assert!(text.contains("\x1b[1;38;5;123;48;5;22m<|im_end|>\x1b[0m\x1b[2m⏎"));
        assert!(!text.contains('⟦'));
    }

    #[test]
    fn a_dataset_cannot_drive_the_terminal() {
        let mut hostile = of(vec![token(
            "text",
            true,
            "\x1b[2J\x1b]0;owned\x07\u{202e}\r\u{9b}K",
        )]);
        hostile.source = "\x1b[31m.jsonl:1".to_owned();
        hostile.notes.push("\x1b[2J".to_owned());
        for text in [row(&hostile, PLAIN), table(&hostile, PLAIN)] {
            assert!(
                !text.chars().any(|c| c.is_control() && c != '\n'),
                "{text:?}"
            );
            assert!(!text.contains('\u{202e}'));
        }
        for text in [row(&hostile, COLORED), table(&hostile, COLORED)] {
            for (at, _) in text.match_indices('\x1b') {
                let rest = text[at + 1..].trim_start_matches(['[', ';']);
                let parameters = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
                assert!(parameters.starts_with('m'), "{text:?}");
            }
            assert!(!text.contains("\x1b[31m"));
        }
    }

    #[test]
    fn brackets_of_the_text_are_not_ours() {
        let text = row(&of(vec![token("text", true, "a⟧b")]), PLAIN);
        assert!(text.contains(r"⟦a\u{27e7}b⟧"), "{text}");
        assert!(row(&of(vec![token("text", true, "a⟧b")]), COLORED).contains("a⟧b"));
    }

    #[test]
    fn lines_keep_within_the_width() {
        let tokens = (0..40).map(|i| token("text", i % 3 == 0, " 世界x"));
        let mut tokens: Vec<_> = tokens.collect();
        tokens.push(token("text", true, &"long".repeat(50)));
        tokens.push(token("text", false, "\n\n"));
        for width in [0, 30, 60, 200] {
            let text = row(&of(tokens.clone()), Style { width, ..PLAIN });
            let body: Vec<_> = text.lines().skip(1).collect();
            let widest = width.max(GUTTER + 3 + NARROWEST + 30);
            assert!(body.iter().all(|line| columns(line) <= widest), "{text}");
            let all: String = body
                .iter()
                .map(|line| &line[GUTTER + RULE.len()..])
                .collect();
            let all = all.replace([OPEN, CLOSE], "");
            let expected: String = tokens.iter().map(|t| &*t.text).collect();
            assert_eq!(all, expected.replace('\n', NEWLINE));
        }
    }

    #[test]
    fn segments_and_padding_of_a_packed_row() {
        let mut tokens = vec![token("text", true, "one"), token("text", true, "two")];
        tokens[1].segment = 1;
        for _ in 0..1200 {
            let mut padding = token("padding", false, "<|pad|>");
            padding.segment = 1;
            tokens.push(padding);
        }
        let text = row(&of(tokens), PLAIN);
        let expected = "\
text      │ ⟦one⟧
── segment 1, positions from 0 ────────────────────────────
text      │ ⟦two⟧
padding   │ <|pad|> × 1,200
";
        assert!(text.contains("── segment 0, positions from 0 ───"));
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn tokens_one_a_line() {
        let mut tokens = vec![
            token("template", false, "<|im_end|>"),
            token("assistant", true, " \"a\\n\n"),
            token("assistant", true, ""),
        ];
        tokens[1].position = 1;
        tokens[1].id = 151_643;
        let text = table(&of(tokens), PLAIN);
        let expected = r#" index position segment      id role      trains token
     0        0       0       7 template         <|im_end|>
     1        1       0  151643 assistant yes    " \"a\\n\n"
     2        0       0       7 assistant yes    - (part of the character before)
"#;
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn an_empty_row_has_a_head_alone() {
        let mut empty = of(Vec::new());
        empty.side = Some("rejected");
        empty.notes.push("nothing trains".to_owned());
        assert_eq!(
            row(&empty, PLAIN),
            "row 3  data/chat.jsonl:17  rejected  0 tokens, 0 trained (0.0 %)\nnote: nothing trains\n"
        );
    }
}
