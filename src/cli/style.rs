//! What a terminal takes, colours and width, and how numbers are written.

use std::env;
use std::ffi::OsString;

use console::Term;

/// Columns where there is no terminal to ask.
const DEFAULT_WIDTH: usize = 100;

/// How text may look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Whether escape sequences for colours are understood.
    pub color: bool,
    /// Columns of a line.
    pub width: usize,
}

/// What a piece of text is there for; its colours follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// Headings and labels.
    Heading,
    /// Of less interest.
    Dim,
    /// A special token.
    Special,
    /// Trains.
    Trained,
    /// A special token that trains.
    TrainedSpecial,
    /// To take note of.
    Notice,
}

impl Paint {
    /// Its parameters of the escape sequence "select graphic rendition". What trains has a
    /// background, so that spaces show too, and a foreground that can be read on it in any theme.
    fn code(self) -> &'static str {
        match self {
            Self::Heading => "1",
            Self::Dim => "2",
            Self::Special => "36",
            Self::Trained => "38;5;194;48;5;22",
            Self::TrainedSpecial => "1;38;5;123;48;5;22",
            Self::Notice => "33",
        }
    }
}

impl Style {
    /// What standard output takes. `NO_COLOR`, `CLICOLOR_FORCE`, `CLICOLOR`, `TERM` and `COLUMNS`
    /// are heeded, in this order.
    pub fn detect(is_terminal: bool) -> Self {
        let columns = env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
        let measured = || {
            let (_, columns) = Term::stdout().size_checked().filter(|_| is_terminal)?;
            Some(usize::from(columns))
        };
        let width = columns.filter(|c| *c > 0).or_else(measured);
        Self {
            color: takes_color(is_terminal, |name| env::var_os(name)),
            width: width.unwrap_or(DEFAULT_WIDTH),
        }
    }

    /// Text in its colours; as it is where there are none.
    pub fn paint(self, paint: Paint, text: &str) -> String {
        if self.color && !text.is_empty() {
            format!("\x1b[{}m{text}\x1b[0m", paint.code())
        } else {
            text.to_owned()
        }
    }
}

/// Whether to write colours: see <https://no-color.org> and <https://bixense.com/clicolors>.
fn takes_color(is_terminal: bool, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is = |name: &str, value: &str| variable(name).is_some_and(|v| v == value);
    let is_set = |name: &str| variable(name).is_some_and(|v| !v.is_empty());
    if is_set("NO_COLOR") {
        return false;
    }
    if is_set("CLICOLOR_FORCE") && !is("CLICOLOR_FORCE", "0") {
        return true;
    }
    is_terminal && !is("CLICOLOR", "0") && !is("TERM", "dumb")
}

/// The columns that a text takes.
pub fn columns(text: &str) -> usize {
    console::measure_text_width(text)
}

/// `1234567` as `1,234,567`.
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share from 0 to 1 as `12.3 %`. Little is never written as nothing, nor most as all.
pub fn percent(share: f64) -> String {
    if share > 0.0 && share < 0.0005 {
        "<0.1 %".to_owned()
    } else if (0.9995..1.0).contains(&share) {
        ">99.9 %".to_owned()
    } else {
        format!("{:.1} %", share * 100.0)
    }
}

/// A part of a whole as `12.3 %`; nothing of nothing is `0.0 %`.
pub fn percent_of(part: usize, whole: usize) -> String {
    percent(part as f64 / whole.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(is_terminal: bool, variables: &[(&str, &str)]) -> bool {
        takes_color(is_terminal, |name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_user_has_the_last_word_on_colours() {
        assert!(with(true, &[]));
        assert!(!with(false, &[]));
        assert!(!with(true, &[("NO_COLOR", "1")]));
        assert!(with(true, &[("NO_COLOR", "")]));
        assert!(with(false, &[("CLICOLOR_FORCE", "1")]));
        assert!(!with(false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!with(true, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]));
        assert!(!with(true, &[("CLICOLOR", "0")]));
        assert!(!with(true, &[("TERM", "dumb")]));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1000), "1,000");
        assert_eq!(thousands(12_345_678), "12,345,678");
    }

    #[test]
    fn shares_tell_something_from_nothing() {
        assert_eq!(percent_of(0, 0), "0.0 %");
        assert_eq!(percent_of(1, 8), "12.5 %");
        assert_eq!(percent_of(1, 100_000), "<0.1 %");
        assert_eq!(percent_of(99_999, 100_000), ">99.9 %");
        assert_eq!(percent_of(7, 7), "100.0 %");
        assert_eq!(percent(f64::NAN), "NaN %");
    }

    #[test]
    fn plain_text_has_no_escapes() {
        let plain = Style {
            color: false,
            width: 80,
        };
        assert_eq!(plain.paint(Paint::Trained, "a"), "a");
        let colored = Style {
            color: true,
            ..plain
        };
        assert_eq!(colored.paint(Paint::Dim, "a"), "\x1b[2ma\x1b[0m");
    }
}
