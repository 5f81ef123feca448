//! What a recipe says of its data: sources, formats, lengths, bad rows, and the mask contract.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;

use lorafit::data::tokenize::ChatTokenizer;
use lorafit::data::{Dataset, IGNORE_INDEX};
use lorafit::recipe::named_templates::{EndOfTurn, NAMED};
use lorafit::recipe::plan::{
    Clause, DataFormat, DataPlan, OnBadRow, SampleBy, SourcePlan, Truncate,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::reference::own;
use crate::rows::{
    PLAIN, chat, file, load, load_text, plan, tokenizer, tokenizer_with, trained_text,
};

/// The text that trains, of each sample.
fn trained(dataset: &Dataset, tokenizer: &ChatTokenizer) -> Vec<String> {
    let all = dataset.train.iter();
    all.map(|sample| trained_text(&sample, tokenizer)).collect()
}

#[test]
fn sources_of_every_kind_make_one_dataset() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let path = |name: &str| at(name).display().to_string();
    fs::create_dir_all(at("folder/below")).unwrap();
    fs::write(at("a1.jsonl"), chat(&[("user", "q"), ("assistant", "one")])).unwrap();
    fs::write(at("a2.jsonl"), chat(&[("user", "q"), ("assistant", "two")])).unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let row = json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "three"}]});
    packed.write_all(row.to_string().as_bytes()).unwrap();
    fs::write(at("share.json.gz"), packed.finish().unwrap()).unwrap();
    fs::write(at("folder/table.csv"), "ask,say\nq,\"four, five\"\n").unwrap();
    fs::write(at("folder/below/table.tsv"), "ask\tsay\nq\tsix\n").unwrap();
    fs::write(at("folder/README.md"), "Not data.").unwrap();
    fs::write(at("poem.txt"), "a b\nc\n\n\nd\n").unwrap();
    let mut data = plan(&[]);
    data.train = vec![
        SourcePlan::new(path("a*.jsonl")),
        SourcePlan::new(path("share.json.gz")),
        SourcePlan {
            format: Some(DataFormat::PromptCompletion),
            fields: BTreeMap::from([
                ("prompt".to_owned(), "ask".to_owned()),
                ("completion".to_owned(), "say".to_owned()),
            ]),
            ..SourcePlan::new(path("folder"))
        },
        SourcePlan {
            sample_by: SampleBy::Paragraph,
            ..SourcePlan::new(path("poem.txt"))
        },
    ];
    let tokenizer = tokenizer();
    let dataset = load(&data, &tokenizer).unwrap();
    let end = |text: &str| format!("{text}<|im_end|>");
    let want = ["one", "two", "three", "six", "four, five", "a b\nc", "d"].map(end);
    assert_eq!(trained(&dataset, &tokenizer), want);
    let formats: Vec<&str> = dataset
        .report
        .sources
        .iter()
        .map(|s| s.format.name())
        .collect();
    assert_eq!(
        formats,
        ["messages", "sharegpt", "prompt_completion", "text"]
    );
    let rows: Vec<usize> = dataset.report.sources.iter().map(|s| s.rows).collect();
    assert_eq!(rows, [2, 1, 2, 2]);
}

/// Ids and labels of every golden conversation, through the whole pipeline: those of transformers'
/// `apply_chat_template` with its assistant mask, also where the template marks nothing and spans
/// must be derived.
#[test]
fn golden_conversations_are_transformers_token_for_token_and_mask_for_mask() {
    let read = |name: &str| -> Value {
        let text = fs::read_to_string(own().join("tokenizer").join(name)).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let (expected, conversations) = (read("expected.json"), read("conversations.json"));
    let cases = expected["chat"].as_array().unwrap();
    let case = |template: &str, conversation: &Value| {
        let is_it = |case: &&Value| {
            case["template"] == template
                && case["conversation"] == *conversation
                && case["add_generation_prompt"] == false
        };
        cases.iter().find(is_it).unwrap()
    };
    let (mut compared, mut other_text) = (0, Vec::new());
    for template in ["chatml", "chatml_plain"] {
        let file = format!("tokenizer/templates/{template}.jinja");
        let tokenizer = tokenizer_with(&fs::read_to_string(own().join(file)).unwrap());
        for conversation in conversations.as_array().unwrap() {
            let name = &conversation["name"];
            let (want, masked) = (case(template, name), case("chatml", name));
            let mut row = conversation.clone();
            row.as_object_mut().unwrap().remove("name");
            let loaded = waiving(&row.to_string(), &tokenizer, &Clause::ALL);
            let mask = masked["assistant_mask"].as_array();
            if mask.is_none_or(|mask| mask.iter().all(|bit| *bit == 0)) {
                assert!(loaded.is_err(), "{template} × {name} has nothing to train");
                continue;
            }
            if template == "chatml_plain" && name == "assistant_first" {
                // It cannot render the beginning of a conversation without messages.
                let error = loaded.unwrap_err().to_string();
                assert!(error.contains("cannot be told exactly"), "{error}");
                continue;
            }
            let sample = loaded
                .unwrap_or_else(|e| panic!("{template} × {name}: {e}"))
                .train
                .get(0);
            assert_eq!(
                json!(sample.input_ids),
                want["input_ids"],
                "{template} × {name}"
            );
            compared += 1;
            // The plain template has a default system prompt, no tools, and strips contents: its
            // mask is the other's where its ids are.
            let ids = |case: &Value| case["input_ids"].as_array().unwrap().clone();
            if !ids(want).ends_with(&ids(masked)) {
                other_text.push(name.as_str().unwrap());
                continue;
            }
            let before = ids(want).len() - ids(masked).len();
            let trains = sample.labels.iter().map(|l| u8::from(*l != IGNORE_INDEX));
            let trains: Vec<u8> = trains.collect();
            assert!(!trains[..before].contains(&1), "{template} × {name}");
            assert_eq!(
                json!(trains[before..]),
                masked["assistant_mask"],
                "{template} × {name}"
            );
        }
    }
    // All but one without messages and two without an answer, twice, and the one above.
    assert_eq!(
        compared,
        2 * (conversations.as_array().unwrap().len() - 3) - 1
    );
    assert_eq!(
        other_text,
        [
            "whitespace",
            "tools_listed",
            "tool_call",
            "tool_call_null_content"
        ]
    );
}

#[test]
fn turns_may_be_kept_from_training() {
    let tokenizer = tokenizer();
    let row = |weight: Value| {
        json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "wrong", "weight": weight},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "right"},
        ]})
        .to_string()
    };
    for tokenizer in [&tokenizer, &tokenizer_with(PLAIN)] {
        let dataset = load_text(row(json!(0)), tokenizer).unwrap();
        assert_eq!(trained(&dataset, tokenizer), ["right<|im_end|>"]);
        let dataset = load_text(row(json!(1)), tokenizer).unwrap();
        let both = ["wrong<|im_end|>right<|im_end|>"];
        assert_eq!(trained(&dataset, tokenizer), both);
    }
    let never = row(json!(0)).replace("\"right\"", "\"right\",\"train\":false");
    let error = load_text(&never, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("all labels are masked"), "{error}");
}

#[test]
fn long_samples_are_cut_on_either_side_left_out_or_refused() {
    let tokenizer = tokenizer();
    let short = chat(&[("user", "a"), ("assistant", "b")]);
    let long = chat(&[("user", "a"), ("assistant", &"b ".repeat(50))]);
    let file = file("data.jsonl", short + &long);
    let loaded = |truncate| {
        let mut plan = plan(&[&file.path]);
        plan.max_seq_len = 32;
        plan.truncate = truncate;
        load(&plan, &tokenizer)
    };
    let whole = load(&plan(&[&file.path]), &tokenizer).unwrap().train.get(1);
    let right = loaded(Truncate::Right).unwrap();
    assert_eq!(right.train.get(1).input_ids, whole.input_ids[..32]);
    let left = loaded(Truncate::Left).unwrap();
    let (kept, count) = (left.train.get(1), whole.input_ids.len());
    // Behind BOS, which this row begins with.
    assert_eq!(kept.input_ids[0], whole.input_ids[0]);
    assert_eq!(kept.input_ids[1..], whole.input_ids[count - 31..]);
    assert_eq!(kept.labels[1..], whole.labels[count - 31..]);
    for dataset in [&left, &right] {
        assert_eq!((dataset.report.truncated, dataset.report.dropped), (1, 0));
    }
    let dropped = loaded(Truncate::Drop).unwrap();
    assert_eq!((dropped.train.len(), dropped.report.dropped), (1, 1));
    let error = loaded(Truncate::Fail).unwrap_err().to_string();
    let tokens = format!(":2: the row has {count} tokens, more than data.max_seq_len = 32");
    assert!(error.contains(&tokens), "{error}");
}

#[test]
fn bad_rows_are_left_out_when_asked_but_not_what_is_wrong_with_all() {
    let tokenizer = tokenizer();
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    let bad = "{\"messages\": [{\"role\": \"usr\", \"content\": \"a\"}]}\nnot JSON\n";
    let file = file("data.jsonl", good.repeat(3) + bad + &good);
    let mut plan = plan(&[&file.path]);
    plan.on_bad_row = OnBadRow::Skip;
    let report = load(&plan, &tokenizer).unwrap().report;
    assert_eq!(
        (report.rows, report.train_samples, report.bad_rows),
        (6, 4, 2)
    );
    assert!(report.bad_rows_shown[0].contains(":4: `messages[0].role`"));
    assert!(report.bad_rows_shown[1].contains(":5:"));
    // A template that breaks the contract breaks it in every row: that is not for skipping.
    let broken = tokenizer_with(&PLAIN.replace("<|im_end|>", "<|endoftext|>"));
    let error = load(&plan, &broken).unwrap_err().to_string();
    assert!(
        error.contains("is not a labelled token that generation stops on"),
        "{error}"
    );
    assert!(error.contains("waive"), "{error}");
}

/// Loads rows with clauses waived.
fn waiving(
    rows: &str,
    tokenizer: &ChatTokenizer,
    clauses: &[Clause],
) -> Result<Dataset, lorafit::data::DataError> {
    let file = file("data.jsonl", rows);
    let plan = DataPlan {
        waive: clauses.to_vec(),
        ..plan(&[&file.path])
    };
    load(&plan, tokenizer)
}

/// The golden tokenizer whose `tokenizer_config.json` and `generation_config.json` say more.
fn tokenizer_saying(config: &Value, generation: &Value) -> ChatTokenizer {
    let (dir, golden) = (tempfile::tempdir().unwrap(), own().join("tokenizer"));
    for name in ["tokenizer.json", "chat_template.jinja"] {
        fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let text = fs::read_to_string(golden.join("tokenizer_config.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in config.as_object().unwrap() {
        file[key] = value.clone();
    }
    fs::write(dir.path().join("tokenizer_config.json"), file.to_string()).unwrap();
    fs::write(
        dir.path().join("generation_config.json"),
        generation.to_string(),
    )
    .unwrap();
    ChatTokenizer::from_dir(dir.path(), None).unwrap()
}

#[test]
fn each_clause_of_the_contract_is_checked_and_can_be_waived() {
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    let none = json!({});
    let unended = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let twice = "{{ bos_token }}".to_owned() + "{{ bos_token }}" + PLAIN;
    let text_bos = json!({"bos_token": "<|endoftext|>"});
    let cases = [
        (
            Clause::EndOfTurn,
            row.clone(),
            tokenizer_with(unended),
            "ends assistant turn 1 with",
        ),
        (
            Clause::Bos,
            row.clone(),
            tokenizer_with(&twice),
            "starts with `<|im_start|>` twice",
        ),
        (
            Clause::Pad,
            chat(&[("user", "a"), ("assistant", "b<|pad|>")]),
            tokenizer(),
            "is both the padding token and one that trains",
        ),
        (
            Clause::Labels,
            chat(&[("user", "a")]) + &row,
            tokenizer(),
            "all labels are masked",
        ),
        (
            Clause::StopToken,
            row.clone(),
            tokenizer_saying(&none, &json!({"eos_token_id": 0})),
            "turns end with `<|im_end|>`, but generation_config.json stops on `<|endoftext|>` only",
        ),
    ];
    for (clause, rows, tokenizer, want) in &cases {
        let error = waiving(rows, tokenizer, &[]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}\n  lacks {want}");
        let name = clause.name();
        assert!(
            error.contains(&format!("data.waive: [{name}]")),
            "{error}\n  names no {name}"
        );
        // Other clauses do not help; its own does.
        let mut others = Clause::ALL.to_vec();
        others.retain(|other| other != clause);
        assert!(waiving(rows, tokenizer, &others).is_err(), "{name}");
        let dataset = waiving(rows, tokenizer, &[*clause]).unwrap();
        assert_eq!(dataset.train.len(), 1, "{name}");
        assert_eq!(
            dataset.report.unlabelled,
            usize::from(*clause == Clause::Labels)
        );
    }
    // The golden itself keeps all of them.
    let kept = tokenizer_saying(&text_bos, &json!({"eos_token_id": [0, 2]}));
    waiving(&row, &kept, &[]).unwrap();
}

#[test]
fn a_template_of_another_family_is_named_as_such() {
    let rows = chat(&[("user", "a"), ("assistant", "b")]).repeat(3);
    let tokenizer = ChatTokenizer::from_dir(&own().join("tokenizer"), Some("llama3".as_ref()));
    let error = load_text(rows, &tokenizer.unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`<|eot_id|>`, which should end it, is no token"),
        "{error}"
    );
    // What is the same in many rows is said once.
    assert!(error.contains("data.jsonl:3: the same"), "{error}");
}

#[test]
fn tokens_of_the_datasets_author_are_held_to_the_contract_too() {
    let tokenizer = tokenizer();
    let row = |labels: [i32; 4]| json!({"input_ids": [1, 70, 71, 2], "labels": labels}).to_string();
    let x = IGNORE_INDEX;
    let dataset = load_text(row([x, x, 71, 2]), &tokenizer).unwrap();
    assert_eq!(dataset.report.format, DataFormat::Tokens);
    assert_eq!(dataset.train.get(0).labels, [x, x, 71, 2]);
    for (labels, want) in [
        ([x, 70, 71, x], "so the end of the turn is never learned"),
        ([x, x, 2, x], "a label is -100 or the id of its own token"),
        ([x, x, x, x], "no token of the row would train"),
    ] {
        let error = load_text(row(labels), &tokenizer).unwrap_err().to_string();
        assert!(error.contains(want), "{error}\n  lacks {want}");
    }
    let error = load_text("{\"input_ids\": [1, 9999, 2]}", &tokenizer).unwrap_err();
    assert!(
        error.to_string().contains("has ids up to 511 only"),
        "{error}"
    );
}

#[test]
fn preference_pairs_are_read_and_not_trained_on() {
    let tokenizer = tokenizer();
    let row = json!({"prompt": "a", "chosen": "good", "rejected": "bad"}).to_string();
    let dataset = load_text(&row, &tokenizer).unwrap();
    assert_eq!(dataset.report.format, DataFormat::Preference);
    assert_eq!(
        trained(&dataset, &tokenizer),
        ["good<|im_end|>", "bad<|im_end|>"]
    );
    assert!(dataset.holds_pairs());
}

/// The golden tokenizer with a named template and the special tokens that it writes.
fn with_named(name: &str, end_of_turn: EndOfTurn) -> ChatTokenizer {
    let (dir, golden) = (tempfile::tempdir().unwrap(), own().join("tokenizer"));
    fs::copy(
        golden.join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let eos = end_of_turn.text("</s>");
    let mut specials = vec!["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    specials.push(eos);
    specials.dedup();
    // The golden has the last two already, as tokens 1 and 2.
    let new = specials.iter().filter(|token| !token.starts_with("<|im_"));
    let added: serde_json::Map<String, Value> = new
        .zip(512..)
        .map(|(token, id)| (id.to_string(), json!({"content": token, "special": true})))
        .collect();
    let config = json!({
        "bos_token": "<s>", "eos_token": eos, "pad_token": "<|pad|>",
        "added_tokens_decoder": added,
    });
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    ChatTokenizer::from_dir(dir.path(), Some(name.as_ref())).unwrap()
}

/// Contents that no template rewrites: words without white space around them.
fn content() -> impl Strategy<Value = String> {
    prop::collection::vec("[a-zé👩0-9]{1,6}", 1..5).prop_map(|words| words.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    /// Each answer trains with its end of turn, in every named template; nothing of what others
    /// say does.
    #[test]
    fn named_templates_train_answers_and_nothing_else(
        template in 0..NAMED.len(),
        turns in prop::collection::vec((content(), content()), 1..5),
    ) {
        let named = &NAMED[template];
        let tokenizer = with_named(named.name, named.end_of_turn);
        let messages: Vec<(&str, String)> = turns
            .iter()
            .flat_map(|(question, answer)| {
                [("user", format!("Q{question}Q")), ("assistant", format!("A{answer}A"))]
            })
            .collect();
        let messages: Vec<_> = messages.iter().map(|(role, text)| (*role, text.as_str())).collect();
        let dataset = load_text(chat(&messages), &tokenizer).unwrap();
        let sample = dataset.train.get(0);
        // The runs of labels, as texts.
        let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
        for label in &sample.labels {
            match u32::try_from(*label) {
                Ok(id) => runs.last_mut().unwrap().push(id),
                Err(_) => runs.push(Vec::new()),
            }
        }
        runs.retain(|run| !run.is_empty());
        let end = named.end_of_turn.text("</s>");
        prop_assert_eq!(runs.len(), turns.len(), "{}", named.name);
        for (run, (_, answer)) in runs.iter().zip(&turns) {
            let text = tokenizer.decode(run, false).unwrap();
            let want = format!("A{answer}A");
            let (before, behind) = text.split_once(&want).expect("the answer trains");
            prop_assert_eq!(behind.trim(), end, "{}: {:?}", named.name, &text);
            // Reasoning models write an empty thought before it.
            let before = before.replace("<think>", "").replace("</think>", "");
            prop_assert_eq!(before.trim(), "", "{}: {:?}", named.name, &text);
        }
    }
}
