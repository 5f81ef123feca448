//! Tokenizers and chat templates: the same text and ids as transformers gives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lorafit::data::conversation::Message;
use lorafit::data::mask::token_range;
use lorafit::data::template::{ChatTemplate, Rendered, Request, TemplateError};
use lorafit::data::tokenize::{ChatTokenizer, TokenizerError};
use lorafit::quant::gguf::{Metadata, Value as Meta};
use serde_json::{Map, Value, json};

use crate::reference::reference;

fn folder() -> PathBuf {
    reference().join("tokenizer")
}

fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::from_dir(&folder(), None).unwrap()
}

/// The variables that the golden tokenizer gives to templates.
fn special_tokens() -> Map<String, Value> {
    let config = read_json(&folder().join("tokenizer_config.json"));
    let is_token = |key: &str| key.ends_with("_token");
    let config = config.as_object().unwrap().clone().into_iter();
    config.filter(|(key, _)| is_token(key)).collect()
}

fn objects(value: &Value) -> Vec<Map<String, Value>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// 1 on the tokens of generation blocks.
fn assistant_mask(tokenizer: &ChatTokenizer, rendered: &Rendered) -> Vec<u8> {
    let encoded = tokenizer.encode_with_spans(&rendered.text).unwrap();
    let mut mask = vec![0; encoded.ids.len()];
    for block in rendered.generation.iter().filter(|block| !block.is_empty()) {
        mask[token_range(&encoded.spans, block)].fill(1);
    }
    mask
}

/// One golden rendering; `Err` says what differs.
fn check_chat(
    case: &Value,
    conversation: &Value,
    template: &ChatTemplate,
    tokenizer: &ChatTokenizer,
) -> Result<(), String> {
    let messages = objects(&conversation["messages"]);
    let result = template.render(&Request {
        messages: &messages,
        tools: conversation.get("tools").filter(|t| !t.is_null()),
        variables: conversation.get("kwargs").and_then(Value::as_object),
        add_generation_prompt: case["add_generation_prompt"] == true,
    });
    if let Some(want) = case["error"].as_str() {
        return match result {
            Ok(rendered) => Err(format!(
                "must fail with `{want}`, renders {:?}",
                rendered.text
            )),
            Err(TemplateError::Refused { message, .. }) if message != want => {
                Err(format!("must refuse with `{want}`, says `{message}`"))
            }
            Err(_) => Ok(()),
        };
    }
    let rendered = result.map_err(|e| e.to_string())?;
    if Some(rendered.text.as_str()) != case["rendered"].as_str() {
        return Err(format!(
            "renders {:?}, not {}",
            rendered.text, case["rendered"]
        ));
    }
    let ids = tokenizer.encode(&rendered.text, false).unwrap();
    if json!(ids) != case["input_ids"] {
        return Err(format!("ids {ids:?}, not {}", case["input_ids"]));
    }
    match case.get("assistant_mask") {
        Some(want) if *want != json!(assistant_mask(tokenizer, &rendered)) => {
            Err("another assistant mask".to_owned())
        }
        _ => Ok(()),
    }
}

#[test]
fn chats_are_rendered_and_tokenised_as_transformers_does() {
    let tokenizer = tokenizer();
    let expected = read_json(&folder().join("expected.json"));
    let conversations = read_json(&folder().join("conversations.json"));
    let conversations: BTreeMap<&str, &Value> = conversations
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["name"].as_str().unwrap(), c))
        .collect();
    let mut failures = Vec::new();
    let cases = expected["chat"].as_array().unwrap();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let path = folder().join("templates").join(format!("{name}.jinja"));
        let source = fs::read_to_string(path).unwrap();
        let template = ChatTemplate::new(name, source, special_tokens()).unwrap();
        let conversation = case["conversation"].as_str().unwrap();
        let result = check_chat(case, conversations[conversation], &template, &tokenizer);
        if let Err(difference) = result {
            let prompt = &case["add_generation_prompt"];
            failures.push(format!("{name} × {conversation} × {prompt}: {difference}"));
        }
    }
    println!(
        "tokenizer/chat: {} of {} renderings passed",
        cases.len() - failures.len(),
        cases.len()
    );
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Compares ids and decoded text of all golden texts.
fn check_texts(tokenizer: &ChatTokenizer, origin: &str) {
    let expected = read_json(&folder().join("expected.json"));
    let texts = expected["texts"].as_array().unwrap();
    for case in texts {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(json!(ids), case["input_ids"], "{origin}: {text:?}");
        let special = tokenizer.encode(text, true).unwrap();
        assert_eq!(
            json!(special),
            case["input_ids_with_special"],
            "{origin}: {text:?}"
        );
        let decoded = tokenizer.decode(&ids, false).unwrap();
        assert_eq!(json!(decoded), case["decoded"], "{origin}: {text:?}");
        let skipped = tokenizer.decode(&ids, true).unwrap();
        assert_eq!(
            json!(skipped),
            case["decoded_skip_special"],
            "{origin}: {text:?}"
        );
    }
    println!("tokenizer/texts: {} texts of {origin} passed", texts.len());
}

#[test]
fn texts_are_encoded_and_decoded_as_transformers_does() {
    check_texts(&tokenizer(), "tokenizer.json");
}

#[test]
fn the_tokenizer_in_a_gguf_file_is_the_same() {
    let path = reference().join("quant/gguf/llama.gguf");
    let gguf = ChatTokenizer::open(&path, None).unwrap();
    check_texts(&gguf, "llama.gguf");
    let original = tokenizer();
    assert_eq!(
        gguf.template().unwrap().source(),
        original.template().unwrap().source()
    );
    assert_eq!(gguf.vocab_size(), original.vocab_size());
    assert_eq!(gguf.eos_id(), original.eos_id());
    assert_eq!(gguf.pad_id(), original.pad_id());
}

#[test]
fn a_transformers_4_config_means_the_same() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        folder().join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let v4 = folder().join("tokenizer_config_v4.json");
    fs::copy(v4, dir.path().join("tokenizer_config.json")).unwrap();
    let old = ChatTokenizer::from_dir(dir.path(), None).unwrap();
    let new = tokenizer();
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Ho")];
    assert_eq!(
        old.render(&messages, true).unwrap(),
        new.render(&messages, true).unwrap()
    );
    assert_eq!(old.stop_ids(), new.stop_ids());
    check_texts(&old, "tokenizer_config_v4.json");
}

#[test]
fn a_saved_tokenizer_is_the_same_with_the_users_template() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("mine.jinja");
    fs::write(&template, "{{ messages[0].content }}{{ eos_token }}").unwrap();
    let gguf = reference().join("quant/gguf/llama.gguf");
    for source in [folder(), gguf] {
        let first = ChatTokenizer::open(&source, Some(&template)).unwrap();
        let saved = dir.path().join("saved");
        let files = first.save(&saved).unwrap();
        assert!(files.iter().all(|file| file.is_file()));
        let again = ChatTokenizer::from_dir(&saved, None).unwrap();
        check_texts(&again, "saved");
        let text = again.render(&[Message::new("user", "x")], false).unwrap();
        assert_eq!(
            text,
            format!("x{}", again.token_text(again.eos_id().unwrap()))
        );
        assert_eq!(again.pad_id(), first.pad_id());
        fs::remove_dir_all(&saved).unwrap();
    }
}

/// A directory with the golden tokenizer.json and a config.
fn with_config(config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        folder().join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn generation_stops_on_every_eos_that_the_model_names() {
    let dir = with_config(&json!({"eos_token": {"content": "<|im_end|>"}}));
    fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": [0, 2]}"#,
    )
    .unwrap();
    fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 5}"#).unwrap();
    let tokenizer = ChatTokenizer::from_dir(dir.path(), None).unwrap();
    assert_eq!(tokenizer.stop_ids(), [2, 0, 5]);
    // Pads are special tokens that end nothing.
    assert_eq!((tokenizer.pad_id(), tokenizer.bos_id()), (3, None));
    assert!(!tokenizer.has_template());
}

#[test]
fn several_templates_need_a_default() {
    let template = |name: &str| json!({"name": name, "template": name});
    let load = |list: Value| {
        let dir = with_config(&json!({"chat_template": list}));
        ChatTokenizer::from_dir(dir.path(), None)
    };
    let chosen = load(json!([template("rag"), template("default")])).unwrap();
    assert_eq!(chosen.template().unwrap().source(), "default");
    let error = load(json!([template("rag"), template("tool_use")])).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("several templates (rag, tool_use)"),
        "{error}"
    );
}

#[test]
fn what_is_missing_is_said_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let says = || {
        ChatTokenizer::from_dir(dir.path(), None)
            .unwrap_err()
            .to_string()
    };
    assert!(
        says().contains("has no tokenizer.json; download it"),
        "{}",
        says()
    );
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    assert!(says().contains("sentencepiece"), "{}", says());
    fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(says().contains("tokenizer.json"), "{}", says());

    let dir = with_config(&json!({"chat_template": "a\n{% for %}"}));
    let error = ChatTokenizer::from_dir(dir.path(), None).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("chat template tokenizer_config.json, line 2: syntax error"),
        "{error}"
    );
}

fn strings(values: &[&str]) -> Meta {
    Meta::Array(
        values
            .iter()
            .map(|v| Meta::String((*v).to_owned()))
            .collect(),
    )
}

/// GGUF metadata of a tokenizer with all byte-level letters `a`, `b`, digits and a special token.
fn small_gguf(pre: &str) -> Metadata {
    let tokens = ["a", "b", "1", "2", "ab", "12", "Ġ", "Ġa", "<s>"];
    let mut meta = BTreeMap::new();
    let mut put = |key: &str, value: Meta| meta.insert(format!("tokenizer.ggml.{key}"), value);
    put("model", Meta::String("gpt2".to_owned()));
    put("pre", Meta::String(pre.to_owned()));
    put("tokens", strings(&tokens));
    put("merges", strings(&["a b", "1 2", "Ġ a"]));
    let kinds = tokens
        .iter()
        .map(|t| Meta::Signed(if *t == "<s>" { 3 } else { 1 }));
    put("token_type", Meta::Array(kinds.collect()));
    put("bos_token_id", Meta::Unsigned(8));
    put("eos_token_id", Meta::Unsigned(8));
    Metadata(meta)
}

#[test]
fn pre_tokenizers_of_gguf_files_split_as_their_originals() {
    let encode = |pre: &str, text: &str| {
        let tokenizer = ChatTokenizer::from_gguf(&small_gguf(pre), None).unwrap();
        tokenizer.encode(text, true).unwrap()
    };
    // Digits stay together in GPT-2 and Llama 3, not in SmolLM, Qwen 2 and Tekken.
    assert_eq!(encode("gpt-2", "ab12 a<s>"), [4, 5, 7, 8]);
    assert_eq!(encode("smollm", "ab12 a<s>"), [4, 2, 3, 7, 8]);
    assert_eq!(encode("qwen2", "ab12 a<s>"), [4, 2, 3, 7, 8]);
    // Llama 3 and Tekken put BOS in front unless the file says otherwise.
    assert_eq!(encode("llama-bpe", "ab12 a<s>"), [8, 4, 5, 7, 8]);
    assert_eq!(encode("tekken", "ab12 a<s>"), [8, 4, 2, 3, 7, 8]);
}

#[test]
fn tokenizers_that_gguf_files_cannot_describe_are_named() {
    let says = |meta: Metadata| {
        ChatTokenizer::from_gguf(&meta, None)
            .unwrap_err()
            .to_string()
    };
    let error = says(small_gguf("falcon"));
    assert!(
        error.contains("`falcon`; supported are default, gpt-2"),
        "{error}"
    );
    let mut meta = small_gguf("default");
    meta.0.insert(
        "tokenizer.ggml.model".to_owned(),
        Meta::String("llama".to_owned()),
    );
    assert!(says(meta).contains("`llama`; only `gpt2`"));
    let mut meta = small_gguf("default");
    meta.0
        .insert("tokenizer.ggml.bos_token_id".to_owned(), Meta::Unsigned(99));
    assert!(says(meta).contains("tokenizer.ggml.bos_token_id must be the id of one of its tokens"));
    let mut meta = small_gguf("default");
    meta.0
        .insert("tokenizer.ggml.merges".to_owned(), strings(&["ab"]));
    assert!(says(meta).contains("tokenizer.ggml.merges must be two tokens"));
}

#[test]
fn rendering_without_a_template_says_so() {
    let tokenizer = ChatTokenizer::from_gguf(&small_gguf("default"), None).unwrap();
    let error = tokenizer
        .render(&[Message::new("user", "a")], true)
        .unwrap_err();
    assert!(matches!(error, TokenizerError::NoChatTemplate));
}
