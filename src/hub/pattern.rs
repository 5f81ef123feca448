//! File patterns of datasets, as `datasets` reads them: `*` and `?` stay inside a folder, `**` does
//! not, `[…]` is one character of a set.

use regex::Regex;

/// Longer patterns are mistakes or mischief.
const MAX_LENGTH: usize = 1000;

/// A pattern for file names.
///
/// It is a regular expression inside, which takes time linear in the name: a dataset's card comes
/// from strangers.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// What files of the folder begin with, when the pattern has no wildcards and may name one.
    folder: Option<String>,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn new(pattern: &str) -> Result<Self, String> {
        if pattern.len() > MAX_LENGTH {
            return Err(format!("has a pattern of more than {MAX_LENGTH} bytes"));
        }
        let plain = pattern.trim_start_matches("./");
        let regex = Regex::new(&format!(r"(?s)\A(?:{})\z", translate(plain)))
            .map_err(|_| format!("has the pattern `{pattern}`, which cannot be read"))?;
        let folder = (!plain.contains(['*', '?', '['])).then(|| {
            let folder = plain.trim_end_matches('/');
            match folder {
                "" | "." => String::new(),
                _ => format!("{folder}/"),
            }
        });
        Ok(Self { regex, folder })
    }

    /// Whether the file is meant.
    pub(super) fn matches(&self, file: &str) -> bool {
        let inside = |folder: &String| file.starts_with(folder.as_str());
        self.regex.is_match(file) || self.folder.as_ref().is_some_and(inside)
    }
}

/// The pattern as a regular expression.
fn translate(pattern: &str) -> String {
    let chars: Vec<char> = pattern.chars().collect();
    let mut regex = String::new();
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        at += 1;
        match c {
            '*' => {
                let stars_start = at - 1;
                while chars.get(at) == Some(&'*') {
                    at += 1;
                }
                let begins_part = stars_start == 0 || chars[stars_start - 1] == '/';
                regex += match at - stars_start {
                    1 => "[^/]*",
                    _ if begins_part && chars.get(at) == Some(&'/') => {
                        at += 1;
                        "(?:.*/)?"
                    }
                    _ => ".*",
                };
            }
            '?' => regex += "[^/]",
            '[' => match set(&chars[at..]) {
                Some((class, length)) => {
                    regex += &class;
                    at += length;
                }
                None => regex += r"\[",
            },
            c => regex += &regex::escape(c.encode_utf8(&mut [0; 4])),
        }
    }
    regex
}

/// A set of characters, from behind its `[`, and how many characters it took; `None` when it does
/// not end.
fn set(chars: &[char]) -> Option<(String, usize)> {
    let negated = matches!(chars.first(), Some('!' | '^'));
    let start = usize::from(negated);
    // A `]` that comes first is one of the set.
    let length = chars.iter().skip(start + 1).position(|c| *c == ']')? + start + 1;
    let members = &chars[start..length];
    let mut class = String::from(if negated { "[^/" } else { "[" });
    let mut at = 0;
    while let Some(&low) = members.get(at) {
        let escape = |c: char| match c.is_ascii_punctuation() {
            true => format!("\\{c}"),
            false => c.to_string(),
        };
        class += &escape(low);
        match (members.get(at + 1), members.get(at + 2)) {
            (Some('-'), Some(&high)) => {
                class += &format!("-{}", escape(high));
                at += 3;
            }
            _ => at += 1,
        }
    }
    Some((class + "]", length + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_match_as_in_datasets() {
        let cases = [
            (
                "data/train-*.parquet",
                "data/train-00000-of-00001.parquet",
                true,
            ),
            ("data/train-*", "data/train/x.parquet", false),
            ("*.csv", "a/b.csv", false),
            ("**.csv", "a/b.csv", true),
            ("**/*.csv", "b.csv", true),
            ("**/*.csv", "a/c/b.csv", true),
            ("data/**", "data/a/b.csv", true),
            ("data/**/x.csv", "data/x.csv", true),
            ("data/**/x.csv", "datax.csv", false),
            ("data", "data/a.csv", true),
            ("data/", "data/a.csv", true),
            ("dat", "data/a.csv", false),
            ("./a.csv", "a.csv", true),
            ("a?.csv", "ab.csv", true),
            ("a?b", "a/b", false),
            ("[0-9][!a-c].txt", "5d.txt", true),
            ("[0-9][!a-c].txt", "5b.txt", false),
            ("[]x-].txt", "].txt", true),
            ("[]x-].txt", "-.txt", true),
            ("[a&&b~].txt", "&.txt", true),
            ("[a.txt", "[a.txt", true),
            ("a+(b).txt", "a+(b).txt", true),
            ("ü*.txt", "üb.txt", true),
            ("", "a.csv", true),
        ];
        for (pattern, file, expected) in cases {
            let found = Pattern::new(pattern).unwrap().matches(file);
            assert_eq!(found, expected, "{pattern} {file}");
        }
        assert!(Pattern::new("[z-a]").is_err());
        assert!(Pattern::new(&"*a".repeat(600)).is_err());
    }
}
