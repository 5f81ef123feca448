//! The named chat templates: the same text and assistant spans as transformers gives, and spans
//! that hold what an assistant writes, its end of turn included.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lorafit::data::template::{ChatTemplate, Rendered, Request, TemplateError};
use lorafit::recipe::named_templates::{self, EndOfTurn, NAMED};
use serde_json::{Map, Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn golden() -> Value {
    let path: PathBuf = repository().join("tests/golden/chat_templates/expected.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn compiled(name: &str, variables: &Value) -> ChatTemplate {
    let template = named_templates::find(name).unwrap_or_else(|| panic!("no template {name}"));
    let variables = variables.as_object().unwrap().clone();
    ChatTemplate::new(name, template.source, variables).unwrap()
}

fn render(
    template: &ChatTemplate,
    conversation: &Value,
    add_generation_prompt: bool,
) -> Result<Rendered, TemplateError> {
    let messages: Vec<Map<String, Value>> =
        serde_json::from_value(conversation["messages"].clone()).unwrap();
    template.render(&Request {
        messages: &messages,
        tools: conversation.get("tools"),
        variables: conversation.get("kwargs").and_then(Value::as_object),
        add_generation_prompt,
    })
}

/// Byte spans as Python counts them, in characters.
fn character_spans(rendered: &Rendered) -> Value {
    let characters = |byte: usize| rendered.text[..byte].chars().count();
    rendered
        .generation
        .iter()
        .map(|span| json!([characters(span.start), characters(span.end)]))
        .collect()
}

#[test]
fn named_templates_render_as_in_transformers() {
    let golden = golden();
    let conversations: BTreeMap<&str, &Value> = golden["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["name"].as_str().unwrap(), c))
        .collect();
    let cases = golden["cases"].as_array().unwrap();
    let mut failures = Vec::new();
    let mut seen = BTreeMap::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        *seen.entry(name).or_insert(0) += 1;
        let template = compiled(name, &golden["variables"]);
        let conversation = conversations[case["conversation"].as_str().unwrap()];
        let result = render(
            &template,
            conversation,
            case["add_generation_prompt"] == true,
        );
        let (found, want) = match &result {
            Ok(rendered) => (
                json!([rendered.text, character_spans(rendered)]),
                json!([case["text"], case["spans"]]),
            ),
            Err(_) => (json!(true), case["refused"].clone()),
        };
        if found != want {
            failures.push(format!(
                "{name} × {}: {found}, not {want}",
                case["conversation"]
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let names: Vec<&str> = named_templates::names().collect();
    assert_eq!(
        seen.into_keys().collect::<Vec<_>>(),
        names,
        "make expected.json again"
    );
}

#[test]
fn every_assistant_message_is_one_span_that_ends_with_its_end_of_turn() {
    let golden = golden();
    let eos = golden["variables"]["eos_token"].as_str().unwrap();
    for named in NAMED {
        let template = compiled(named.name, &golden["variables"]);
        assert!(template.marks_generation(), "{}", named.name);
        for conversation in golden["conversations"].as_array().unwrap() {
            let Ok(rendered) = render(&template, conversation, false) else {
                continue;
            };
            let messages = conversation["messages"].as_array().unwrap();
            let written = messages.iter().filter(|m| m["role"] == "assistant");
            let at = format!("{} × {}", named.name, conversation["name"]);
            assert_eq!(rendered.generation.len(), written.clone().count(), "{at}");
            for (span, message) in rendered.generation.iter().zip(written) {
                let text = &rendered.text[span.clone()];
                assert!(
                    text.ends_with(named.end_of_turn.text(eos)),
                    "{at}: {text:?}"
                );
                let content = message["content"].as_str().unwrap_or_default();
                let answer = content.rsplit("</think>").next().unwrap_or_default();
                assert!(text.contains(answer.trim()), "{at}: {text:?}");
            }
        }
    }
}

/// What is generated after the prompt must be what trains: a rendered turn begins as the prompt
/// for it ends.
#[test]
fn an_answer_trains_right_behind_its_generation_prompt() {
    let variables = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let question = json!({"role": "user", "content": "Why?"});
    let answer = json!({"role": "assistant", "content": "So.", "reasoning_content": "Hm."});
    let prompt = json!({"messages": [question]});
    let whole = json!({"messages": [question, answer]});
    for named in NAMED {
        let template = compiled(named.name, &variables);
        let prompt = render(&template, &prompt, true).unwrap().text;
        let rendered = render(&template, &whole, false).unwrap();
        let before = &rendered.text[..rendered.generation[0].start];
        assert_eq!(before, prompt, "{}", named.name);
    }
}

#[test]
fn what_a_template_has_no_words_for_is_refused() {
    let variables = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let call = json!({"function": {"name": "f", "arguments": {}}});
    let chat = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]});
    for name in ["chatml", "gemma", "llama2", "llama3", "phi4", "deepseek-r1"] {
        let error = render(&compiled(name, &variables), &chat, false).unwrap_err();
        let words = error.to_string();
        assert!(words.contains("cannot write tool calls"), "{name}: {words}");
    }
}

#[test]
fn the_readme_lists_every_template() {
    let path = repository().join("recipes/chat_templates/README.md");
    let readme = fs::read_to_string(path).unwrap();
    for named in NAMED {
        let end = match named.end_of_turn {
            EndOfTurn::Eos => "`eos_token`".to_owned(),
            EndOfTurn::Token(token) => format!("`{}`", token.replace('|', "\\|")),
        };
        let row = format!("| `{}` | {} | {end} |", named.name, named.about);
        assert!(readme.contains(&row), "README.md must have a row {row}");
    }
}
