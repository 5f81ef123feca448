//! Datasets: what trains, what is refused, and in which order it comes.

use std::fs;
use std::path::Path;

use lorafit::data::reader::Place;
use lorafit::data::tokenize::ChatTokenizer;
use lorafit::data::{IGNORE_INDEX, Sample, Split, load as load_dataset};
use lorafit::recipe::plan::{DataFormat, DataPlan, SourcePlan};
use serde_json::json;

use crate::reference::own;
use crate::rows::{
    File, PLAIN, POSITIONS, chat, error_of, file, load, load_text, plan, random_chat, tokenizer,
    tokenizer_with, trained_text,
};
use crate::weights::Random;

#[test]
fn assistant_turns_train_with_their_end_token_and_nothing_else() {
    let row = chat(&[
        ("system", "Be brief."),
        ("user", "a<|im_end|>"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "<|im_end|>d\n"),
    ]);
    for tokenizer in [tokenizer(), tokenizer_with(PLAIN)] {
        let data = load_text(&row, &tokenizer).unwrap();
        assert_eq!(
            trained_text(&data.train.get(0), &tokenizer),
            "b<|im_end|><|im_end|>d\n<|im_end|>"
        );
        assert_eq!(data.report.format, DataFormat::Messages);
    }
}

#[test]
fn formats_are_detected_in_every_kind_of_file() {
    let tokenizer = tokenizer();
    let rows = |file: &File| load(&plan(&[&file.path]), &tokenizer).unwrap();
    let alpaca = json!([
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "output": "Hi."}
    ]);
    let data = rows(&file("alpaca.json", format!("{alpaca:#}")));
    assert_eq!(data.report.format, DataFormat::Alpaca);
    assert_eq!(data.train.get(1).source.place, Place::Line(7));
    let texts: Vec<_> = data
        .train
        .iter()
        .map(|s| trained_text(&s, &tokenizer))
        .collect();
    assert_eq!(texts, ["3<|im_end|>", "Hi.<|im_end|>"]);

    // A byte-order mark, DOS line ends, blank lines, no line end at the end.
    let data = rows(&file(
        "t.jsonl",
        "\u{feff}{\"text\": \"a\"}\r\n\r\n \n{\"text\": \"b\"}",
    ));
    assert_eq!(data.report.format, DataFormat::Text);
    let lines: Vec<Place> = data.train.iter().map(|s| s.source.place).collect();
    assert_eq!(lines, [Place::Line(1), Place::Line(4)]);
    assert_eq!(trained_text(&data.train.get(0), &tokenizer), "a<|im_end|>");
}

#[test]
fn without_a_template_alpaca_rows_use_the_classic_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let golden = own().join("tokenizer");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden.join(name), dir.path().join(name)).unwrap();
    }
    let tokenizer = ChatTokenizer::from_dir(dir.path(), None).unwrap();
    let row = json!({"instruction": "Add.", "input": "1 2", "output": "3"}).to_string();
    let data = load_text(&row, &tokenizer).unwrap();
    assert_eq!(trained_text(&data.train.get(0), &tokenizer), "3<|im_end|>");
    let prompt = tokenizer
        .decode(&data.train.get(0).input_ids, false)
        .unwrap();
    assert!(prompt.starts_with("Below is an instruction"), "{prompt}");
    let error = error_of(chat(&[("user", "a"), ("assistant", "b")]), &tokenizer);
    assert!(error.contains("no chat template"), "{error}");
}

#[test]
fn train_on_inputs_trains_every_token() {
    let tokenizer = tokenizer();
    let file = file("data.jsonl", chat(&[("user", "a"), ("assistant", "b")]));
    let mut plan = plan(&[&file.path]);
    plan.train_on_inputs = true;
    let data = load(&plan, &tokenizer).unwrap();
    let sample = &data.train.get(0);
    let ids: Vec<i32> = sample.input_ids.iter().map(|id| *id as i32).collect();
    assert_eq!(sample.labels, ids);
    assert_eq!(data.report.trained_tokens, ids.len() - 1);
}

#[test]
fn random_conversations_have_every_label_where_it_must_be() {
    let generation = fs::read_to_string(own().join("tokenizer/chat_template.jinja")).unwrap();
    let mut random = Random(7);
    let chats: Vec<_> = (0..400).map(|_| random_chat(&mut random)).collect();
    let rows: String = chats
        .iter()
        .map(|turns| {
            chat(
                &turns
                    .iter()
                    .map(|(r, c)| (*r, c.as_str()))
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    for template in [PLAIN, generation.as_str()] {
        let tokenizer = tokenizer_with(template);
        let data = load_text(&rows, &tokenizer).unwrap();
        for (sample, turns) in data.train.iter().zip(&chats) {
            let (ids, labels) = labelled_by_hand(turns, &tokenizer);
            assert_eq!(sample.input_ids, ids, "{turns:?}");
            assert_eq!(sample.labels, labels, "{turns:?}");
        }
    }
}

/// Ids and labels of a ChatML conversation made turn by turn: each ends with a special token, so
/// the ids of turns are those of the whole.
fn labelled_by_hand(turns: &[(&str, String)], tokenizer: &ChatTokenizer) -> (Vec<u32>, Vec<i32>) {
    let (mut ids, mut labels) = (Vec::new(), Vec::new());
    for (role, content) in turns {
        let start = format!("<|im_start|>{role}\n");
        let end = format!("{start}{content}<|im_end|>").len();
        let text = format!("{start}{content}<|im_end|>\n");
        let tokens = tokenizer.encode_with_spans(&text).unwrap();
        for (id, span) in tokens.ids.iter().zip(&tokens.spans) {
            let trains = *role == "assistant" && span.end > start.len() && span.start < end;
            ids.push(*id);
            labels.push(if trains { *id as i32 } else { IGNORE_INDEX });
        }
    }
    (ids, labels)
}

#[test]
fn templates_whose_spans_cannot_be_told_are_refused() {
    // Cuts earlier answers short, as templates of reasoning models do.
    let rewriting = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content[:1] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let row = chat(&[
        ("user", "a"),
        ("assistant", "bcd"),
        ("user", "e"),
        ("assistant", "f"),
    ]);
    let error = error_of(&row, &tokenizer_with(rewriting));
    assert!(error.starts_with("data.jsonl:1: chat template "), "{error}");
    assert!(error.contains("renders message 1 differently"), "{error}");
    // Not even where the answer holds an end token that the renderings share.
    let row = row.replace("bcd", "b<|im_end|>cd");
    let cutting = rewriting.replace("[:1]", "[:11]");
    let error = error_of(&row, &tokenizer_with(&cutting));
    assert!(error.contains("renders message 1 differently"), "{error}");
    // A single turn is exact.
    let tokenizer = tokenizer_with(rewriting);
    let data = load_text(chat(&[("user", "a"), ("assistant", "bcd")]), &tokenizer).unwrap();
    assert_eq!(
        trained_text(&data.train.get(0), &tokenizer),
        "bcd<|im_end|>"
    );
}

#[test]
fn a_token_that_ends_the_conversation_is_no_rewriting() {
    let template = PLAIN.replace(
        "{% if add",
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add",
    );
    let tokenizer = tokenizer_with(&template);
    let turns = [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ];
    let data = load_text(chat(&turns), &tokenizer).unwrap();
    let text = tokenizer
        .decode(&data.train.get(0).input_ids, false)
        .unwrap();
    assert!(text.ends_with("d<|im_end|>\n<|im_end|>"), "{text}");
    assert_eq!(
        trained_text(&data.train.get(0), &tokenizer),
        "b<|im_end|>d<|im_end|>\n<|im_end|>"
    );
}

#[test]
fn turns_without_a_trained_end_token_are_refused() {
    let row = chat(&[("user", "a"), ("assistant", "b")]);
    for template in [
        // The end token stands outside the generation block.
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}",
        // There is none.
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        // It is not one that generation stops on.
        "{% for m in messages %}<|im_start|>{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
    ] {
        let error = error_of(&row, &tokenizer_with(template));
        assert!(
            error.contains("is not a labelled token that generation stops on (`<|im_end|>`)"),
            "{error}"
        );
    }
}

#[test]
fn bad_input_is_said_with_file_and_line() {
    let tokenizer = tokenizer();
    let good = chat(&[("user", "a"), ("assistant", "b")]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "dataset data.jsonl is empty"),
        (b"\n \r\n".to_vec(), "dataset data.jsonl is empty"),
        (
            format!("{good}{{\"messages\": }}\n").into(),
            "data.jsonl:2:14: not valid JSON: expected value",
        ),
        (
            format!("{good}\n[1]\n").into(),
            "data.jsonl:3: a row must be a JSON object, found an array",
        ),
        (
            b"{\"text\": \"\xff\"}".to_vec(),
            "data.jsonl:1: not UTF-8 text (first wrong byte at 10",
        ),
        (
            chat(&[("user", "a")]).into(),
            "data.jsonl:1: all labels are masked",
        ),
        (
            format!("{good}{{\"text\": \"x\"}}\n").into(),
            "data.jsonl:2: `messages` is missing",
        ),
        (
            b"{\"dialog\": []}".to_vec(),
            "(`dialog`); supported are `messages`",
        ),
        (
            br#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"x": 1}]}]}"#
                .to_vec(),
            "data.jsonl:1: `messages[0].tool_calls[0].function` is missing",
        ),
    ];
    for (content, want) in cases {
        let error = error_of(&content, &tokenizer);
        assert!(error.contains(want), "{error}\n  lacks {want}");
    }
    let error = load(&plan(&[Path::new("/no/such.jsonl")]), &tokenizer).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read dataset /no/such.jsonl: "),
        "{error}"
    );
    let empty = tempfile::tempdir().unwrap();
    let error = load(&plan(&[empty.path()]), &tokenizer).unwrap_err();
    assert!(
        error.to_string().contains("there is no dataset file in"),
        "{error}"
    );
}

#[test]
fn many_bad_rows_are_counted_and_the_first_ten_shown() {
    let rows = chat(&[("user", "a"), ("assistant", "b")]) + &"{\"messages\": []}\n".repeat(25);
    let error = error_of(&rows, &tokenizer());
    assert!(
        error.starts_with(
            "25 rows cannot be trained on, the first 10:\n  data.jsonl:2: `messages` is empty\n"
        ),
        "{error}"
    );
    assert_eq!(error.lines().count(), 11);
}

#[test]
fn damaged_files_never_panic() {
    let tokenizer = tokenizer();
    let rows = chat(&[("user", "aé"), ("assistant", "b \"x\" \\")]).repeat(3);
    let array = format!("[{}]", rows.trim().replace('\n', ",\n"));
    let mut random = Random(11);
    for round in 0..300 {
        let (name, text) = [("a.jsonl", &rows), ("a.json", &array)][round % 2];
        let mut bytes = text.clone().into_bytes();
        let length = bytes.len();
        random.mutate(&mut bytes, length);
        let file = file(name, &bytes);
        let _ = load(&plan(&[&file.path]), &tokenizer);
    }
}

#[test]
fn long_rows_are_cut_counted_and_dropped_when_nothing_trains() {
    let tokenizer = tokenizer();
    let long = chat(&[("user", "a"), ("assistant", &"b ".repeat(50))]);
    let lost = chat(&[("user", &"a ".repeat(50)), ("assistant", "b")]);
    let short = chat(&[("user", "a"), ("assistant", "b")]);
    let file_all = file("data.jsonl", [short, long, lost.clone()].concat());
    let mut plan_all = plan(&[&file_all.path]);
    plan_all.max_seq_len = 32;
    let report = load(&plan_all, &tokenizer).unwrap().report;
    assert_eq!((report.rows, report.train_samples), (3, 2));
    assert_eq!(
        (report.truncated, report.dropped, report.longest),
        (1, 1, 32)
    );

    let error = load_dataset(&plan_all, 0, &tokenizer, 16, &mut |_| {})
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "data.max_seq_len is 32, but the model has positions for 16 tokens only; set data.max_seq_len to 16 or less"
    );
    let only_lost = file("data.jsonl", lost);
    plan_all.train = vec![SourcePlan::new(only_lost.path.display().to_string())];
    let error = load(&plan_all, &tokenizer).unwrap_err().to_string();
    assert!(
        error.starts_with("no training row is left: data.max_seq_len = 32 cuts off"),
        "{error}"
    );
}

#[test]
fn the_validation_split_is_the_seeds_and_loses_nothing() {
    let tokenizer = tokenizer();
    let rows: String = (0..40)
        .map(|i| json!({"text": format!("{i}")}).to_string() + "\n")
        .collect();
    let file = file("data.jsonl", rows);
    let mut plan = plan(&[&file.path]);
    plan.validation_fraction = 0.25;
    let lines = |split: &Split| -> Vec<u64> {
        let line = |sample: Sample| match sample.source.place {
            Place::Line(line) => line,
            Place::Row(_) => panic!("rows of JSON have lines"),
        };
        split.iter().map(line).collect()
    };
    let load = |plan: &DataPlan, seed| {
        load_dataset(plan, seed, &tokenizer, POSITIONS, &mut |_| {}).unwrap()
    };
    let (first, again, other) = (load(&plan, 1), load(&plan, 1), load(&plan, 2));
    assert_eq!((first.train.len(), first.validation.len()), (30, 10));
    assert_eq!(lines(&first.validation), lines(&again.validation));
    assert_ne!(lines(&first.validation), lines(&other.validation));
    let mut all = [lines(&first.train), lines(&first.validation)].concat();
    assert!(lines(&first.train).is_sorted());
    all.sort_unstable();
    assert_eq!(all, (1..=40).collect::<Vec<_>>());
    // At least one row on either side.
    plan.validation_fraction = 0.001;
    assert_eq!(load(&plan, 1).validation.len(), 1);
    plan.validation_fraction = 0.999;
    assert_eq!(load(&plan, 1).train.len(), 1);
    // Files of their own come first.
    plan.validation = vec![SourcePlan::new(file.path.display().to_string())];
    assert_eq!(load(&plan, 1).validation.len(), 40);
}
