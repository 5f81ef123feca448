//! Text of a dataset, safe to show.
//!
//! A dataset is anybody's. Its text may hold escape sequences that drive a terminal, characters that
//! turn the order of others around, or ones that nobody sees. They are written as escapes here.

/// A character that controls how others are shown, or that shows nothing itself.
///
/// The joiners and the variation selectors are let through: emoji and several scripts need them.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'                    // soft hyphen
            | '\u{61c}'                 // Arabic letter mark
            | '\u{180e}'                // Mongolian vowel separator
            | '\u{200b}'                // zero width space
            | '\u{200e}'..='\u{200f}'   // left-to-right and right-to-left mark
            | '\u{2028}'..='\u{202e}'   // line and paragraph separator, embeddings, overrides
            | '\u{2060}'..='\u{206f}'   // word joiner, invisible operators, isolates
            | '\u{feff}'                // byte order mark
            | '\u{fff9}'..='\u{fffb}'   // interlinear annotation
            | '\u{e0000}'..='\u{e007f}' // tags
        )
}

/// Appends a character, as an escape where it is hidden: `\t`, `\n`, `\r`, `\u{1b}`.
pub fn push(out: &mut String, c: char) {
    if is_hidden(c) {
        out.extend(c.escape_default());
    } else {
        out.push(c);
    }
}

/// Text for one line.
pub fn line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push(&mut out, c));
    out
}

/// Text whose line breaks and tabs stay as they are.
pub fn lines(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            _ => push(&mut out, c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_escape_sequence_comes_through() {
        assert_eq!(
            line("a\x1b[2J\x1b]0;title\x07\r\n\tb"),
            r"a\u{1b}[2J\u{1b}]0;title\u{7}\r\n\tb"
        );
        assert_eq!(line("\u{9b}31m\u{7f}\0"), r"\u{9b}31m\u{7f}\u{0}");
    }

    #[test]
    fn nothing_turns_the_order_around() {
        assert_eq!(line("a\u{202e}b\u{2066}c"), r"a\u{202e}b\u{2066}c");
        assert_eq!(line("\u{200f}\u{61c}"), r"\u{200f}\u{61c}");
    }

    #[test]
    fn what_nobody_sees_is_shown() {
        assert_eq!(
            line("\u{200b}\u{feff}\u{e0041}"),
            r"\u{200b}\u{feff}\u{e0041}"
        );
    }

    #[test]
    fn text_of_all_scripts_stays() {
        let text = "Grüße, 世界 👩\u{200d}👧 ❤\u{fe0f} שלום می\u{200c}خواهم \\ {}";
        assert_eq!(line(text), text);
        assert_eq!(lines("a\n\tb\r"), "a\n\tb\\r");
    }
}
