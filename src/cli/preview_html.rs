//! A preview as one page of HTML, for sharing.
//!
//! The page asks for nothing else, and its content security policy forbids that it could. Rows
//! travel as JSON in which every token of the vocabulary stands once; `preview.js` builds the rows
//! near the window from it, as text nodes, so that nothing in a dataset becomes markup or script.

use std::collections::HashMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::style::{percent_of, thousands};
use super::turns;
use super::visible;
use crate::data::preview::{PreviewRow, PreviewToken};

const CSS: &str = include_str!("preview.css");
const SCRIPT: &str = include_str!("preview.js");

/// What the page tells about where its rows are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// Name of the recipe.
    pub recipe: String,
    /// The base model.
    pub model: String,
    /// The chat template: its name, or where it is from; empty where none is used.
    pub template: String,
}

/// The whole page.
pub fn page(rows: &[PreviewRow], about: &About) -> String {
    let title = escape(&about.recipe);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; \
         base-uri 'none'; form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <link rel=\"icon\" href=\"data:,\">\n\
         <title>{title} – lorafit data preview</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
    );
    out += &header(rows, about);
    out += MAIN;
    out += "<script type=\"application/json\" id=\"data\">";
    out += &embedded(&data(rows));
    let _ = writeln!(
        out,
        "</script>\n<script>\n{SCRIPT}</script>\n</body>\n</html>"
    );
    out
}

/// The tools, the legend and the place for the rows.
const MAIN: &str = r#"<div class="bar" role="search">
<input id="find" type="search" placeholder="Find in text or source  ( / )" aria-label="Find in text or source" autocomplete="off" spellcheck="false">
<span id="found" role="status"></span>
<label><input type="checkbox" id="edges" checked> token edges</label>
<label><input type="checkbox" id="only"> only what trains</label>
</div>
<p class="legend" aria-label="Legend"><span class="x y">trains</span> <span class="x">does not train</span>
<span class="x s">special token</span> <span class="x s y">special token that trains</span>
<span class="x"><i class="n"></i> line break</span> <span class="x"><i class="t"></i> tab</span>
<span class="x"><span class="z"></span> part of the character before</span>
<span class="keys">point at a token, or focus a row and use <kbd>←</kbd> <kbd>→</kbd>, for its id, position, segment and role</span></p>
<noscript><p class="note">The rows are drawn by a script inside this page; it needs JavaScript, and nothing from elsewhere.</p></noscript>
<main id="rows"></main>
<p id="none" hidden>No row has that.</p>
<div id="tip" role="status" hidden></div>
"#;

/// What the page is about.
fn header(rows: &[PreviewRow], about: &About) -> String {
    let tokens: usize = rows.iter().map(|row| row.tokens.len()).sum();
    let count = |row: &PreviewRow| row.tokens.iter().filter(|t| t.trained).count();
    let trained: usize = rows.iter().map(count).sum();
    let shown = thousands(rows.len());
    let share = percent_of(trained, tokens);
    let mut facts = vec![("model", escape(&about.model))];
    if !about.template.is_empty() {
        facts.push(("template", escape(&about.template)));
    }
    facts.push(("rows", shown));
    facts.push(("tokens", thousands(tokens)));
    facts.push((
        "trained",
        format!("{} <small>{share}</small>", thousands(trained)),
    ));
    let mut out = format!(
        "<header>\n<p class=\"tool\">lorafit data preview</p>\n<h1>{}</h1>\n<dl>\n",
        escape(&about.recipe)
    );
    for (name, value) in facts {
        let _ = writeln!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    out += "</dl>\n</header>\n";
    out
}

/// The rows as `preview.js` reads them. `ids`, `texts` and `special` are columns of a table of
/// tokens, which rows refer to by place; `roles` are referred to likewise.
fn data(rows: &[PreviewRow]) -> Value {
    let mut table = Table::default();
    let rows: Vec<Value> = rows.iter().map(|row| table.row(row)).collect();
    json!({
        "ids": table.ids,
        "texts": table.texts,
        "special": table.special,
        "roles": table.roles,
        "rows": rows,
    })
}

/// Tokens and roles, each once.
#[derive(Default)]
struct Table<'a> {
    places: HashMap<(u32, &'a str, bool), usize>,
    ids: Vec<u32>,
    texts: Vec<String>,
    special: Vec<u8>,
    roles: Vec<&'static str>,
}

impl<'a> Table<'a> {
    fn row(&mut self, row: &'a PreviewRow) -> Value {
        let tokens: Vec<usize> = row.tokens.iter().map(|token| self.token(token)).collect();
        let turns = turns::turns(&row.tokens);
        let turns: Vec<[usize; 2]> = turns
            .iter()
            .map(|turn| [self.role(turn.role), turn.tokens.len()])
            .collect();
        let notes: Vec<String> = row.notes.iter().map(|note| visible::line(note)).collect();
        json!({
            "number": row.number,
            "source": visible::line(&row.source),
            "side": row.side,
            "notes": notes,
            "tokens": tokens,
            "runs": self.runs(&row.tokens),
            "turns": turns,
        })
    }

    fn token(&mut self, token: &'a PreviewToken) -> usize {
        let key = (token.id, token.text.as_str(), token.special);
        if let Some(place) = self.places.get(&key) {
            return *place;
        }
        let place = self.ids.len();
        self.places.insert(key, place);
        self.ids.push(token.id);
        self.texts.push(visible::lines(&token.text));
        self.special.push(token.special.into());
        place
    }

    fn role(&mut self, role: &'static str) -> usize {
        let known = self.roles.iter().position(|r| *r == role);
        known.unwrap_or_else(|| {
            self.roles.push(role);
            self.roles.len() - 1
        })
    }

    /// Tokens that differ in text and position alone: how many, role, whether they train, segment,
    /// and the first one's position.
    fn runs(&mut self, tokens: &[PreviewToken]) -> Vec<[usize; 5]> {
        let runs = tokens.chunk_by(|a, b| {
            (a.role, a.trained, a.segment, a.position + 1)
                == (b.role, b.trained, b.segment, b.position)
        });
        let run = |run: &[PreviewToken]| {
            let first = &run[0];
            let (role, trained) = (self.role(first.role), first.trained.into());
            [run.len(), role, trained, first.segment, first.position]
        };
        runs.map(run).collect()
    }
}

/// JSON that can stand in a script element: nothing in it ends the element or begins a comment.
fn embedded(value: &Value) -> String {
    let json = value.to_string();
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            _ => out.push(c),
        }
    }
    out
}

/// Text as HTML, for elements and for attributes in quotes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in visible::line(text).chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, role: &'static str, trained: bool) -> PreviewToken {
        PreviewToken {
            id,
            text: text.to_owned(),
            special: text.starts_with("<|"),
            trained,
            role,
            position: 0,
            segment: 0,
        }
    }

    fn row(mut tokens: Vec<PreviewToken>) -> PreviewRow {
        for (position, token) in tokens.iter_mut().enumerate() {
            token.position = position;
        }
        PreviewRow {
            number: 1,
            source: "a.jsonl:1".to_owned(),
            side: None,
            tokens,
            notes: Vec::new(),
        }
    }

    fn about() -> About {
        About {
            recipe: "chat.yaml".to_owned(),
            model: "o/m".to_owned(),
            template: "chatml".to_owned(),
        }
    }

    /// The JSON inside a page, as a browser cuts it out.
    fn data_of(page: &str) -> Value {
        let (_, rest) = page.split_once("id=\"data\">").unwrap();
        let (json, _) = rest.split_once("</script>").unwrap();
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn nothing_in_a_dataset_becomes_markup() {
        let attack = "</script><script>alert(1)</script><!--\u{2028}&lt;";
        let mut hostile = row(vec![token(1, attack, "user", true)]);
        hostile.source = attack.to_owned();
        hostile.notes.push(attack.to_owned());
        let mut about = about();
        about.recipe = "<img src=x onerror=alert(1)>\"'".to_owned();
        let page = page(&[hostile], &about);
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script").count(), 2);
        assert!(!page.contains("alert(1)</script>") && !page.contains("<img"));
        assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;&quot;&#39;"));
        let text = "</script><script>alert(1)</script><!--\\u{2028}&lt;";
        assert_eq!(data_of(&page)["texts"][0], text);
    }

    #[test]
    fn hidden_characters_are_shown() {
        let page = page(
            &[row(vec![token(1, "a\u{202e}\x1b\n\tb", "text", true)])],
            &about(),
        );
        assert_eq!(data_of(&page)["texts"][0], "a\\u{202e}\\u{1b}\n\tb");
    }

    #[test]
    fn the_page_asks_for_nothing_else() {
        let page = page(&[], &about());
        assert!(!page.contains("http://") && !page.contains("https://"));
        assert!(page.contains("default-src 'none'"));
        assert!(!SCRIPT.contains("innerHTML") && !SCRIPT.contains("</script"));
    }

    #[test]
    fn tokens_stand_once_and_runs_are_grouped() {
        let tokens = vec![
            token(9, "<|im_start|>", "template", false),
            token(5, "user\n", "template", false),
            token(6, "ha", "user", false),
            token(6, "ha", "user", false),
            token(9, "<|im_start|>", "template", false),
            token(6, "ha", "assistant", true),
        ];
        let data = data_of(&page(&[row(tokens)], &about()));
        let expected = json!({
            "ids": [9, 5, 6],
            "texts": ["<|im_start|>", "user\n", "ha"],
            "special": [1, 0, 0],
            "roles": ["user", "assistant", "template"],
            "rows": [{
                "number": 1, "source": "a.jsonl:1", "side": null, "notes": [],
                "tokens": [0, 1, 2, 2, 0, 2],
                "runs": [[2, 2, 0, 0, 0], [2, 0, 0, 0, 2], [1, 2, 0, 0, 4], [1, 1, 1, 0, 5]],
                "turns": [[0, 5], [1, 1]],
            }],
        });
        assert_eq!(data, expected);
    }

    #[test]
    fn the_head_counts() {
        let rows = [row(vec![
            token(1, "a", "text", true),
            token(2, "b", "text", false),
        ])];
        let page = page(&rows, &about());
        assert!(page.contains("<dt>rows</dt><dd>1</dd>"));
        assert!(page.contains("<dt>trained</dt><dd>1 <small>50.0 %</small></dd>"));
        assert!(page.contains("<title>chat.yaml – lorafit data preview</title>"));
    }
}
