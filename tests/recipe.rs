//! Recipes: what a user gets to read, and what a plan comes to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use lorafit::recipe::faults::Faults;
use lorafit::recipe::load::load;
use lorafit::recipe::resolve::to_yaml;
use lorafit::recipe::{
    AdapterMethod, BaseInit, DataFormat, LrScheduler, Plan, TargetModules, schema,
};

/// A scratch directory with a data file, where recipes are written and loaded.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Desk(tempfile::tempdir().unwrap());
        fs::write(desk.path("rows.jsonl"), "{\"text\": \"x\"}\n").unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path("recipe.yaml");
        fs::write(&path, text).unwrap();
        path
    }

    /// A recipe that loads, with more lines.
    fn recipe(&self, more: &str) -> String {
        let rows = self.path("rows.jsonl");
        format!(
            "base: {{model: m}}\ndata:\n  train: {}\n{more}",
            rows.display()
        )
    }

    fn load(&self, text: &str, sets: &[&str]) -> Result<Plan, Faults> {
        let sets: Vec<_> = sets.iter().map(|set| (*set).to_owned()).collect();
        load(&self.write(text), &sets)
    }

    fn plan(&self, text: &str, sets: &[&str]) -> Plan {
        self.load(text, sets)
            .unwrap_or_else(|faults| panic!("{faults}"))
    }

    /// What the user reads, without the directory's name.
    fn faults(&self, text: &str, sets: &[&str]) -> Vec<String> {
        self.shown(self.load(text, sets))
    }

    fn shown(&self, result: Result<Plan, Faults>) -> Vec<String> {
        let faults = result.expect_err("the recipe loads").to_string();
        let here = format!("{}/", self.0.path().display());
        faults
            .replace(&here, "")
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

#[test]
fn defaults_are_filled_in() {
    let desk = Desk::new();
    let plan = desk.plan(&desk.recipe(""), &[]);
    assert_eq!(plan.base.revision, "main");
    assert_eq!(plan.base.init, BaseInit::Pretrained);
    assert_eq!(Path::new(&plan.data.train[0].path), desk.path("rows.jsonl"));
    assert_eq!(plan.data.format, DataFormat::Auto);
    assert_eq!(plan.adapter.method, AdapterMethod::Lora);
    assert_eq!((plan.adapter.rank, plan.adapter.alpha), (16, 32.0));
    assert_eq!(
        plan.adapter.target_modules,
        TargetModules::Pattern("all-linear".into())
    );
    assert_eq!(plan.train.learning_rate, 2e-4);
    assert_eq!(plan.train.lr_scheduler, LrScheduler::Cosine);
    assert_eq!(plan.train.max_steps, None);
    assert_eq!(plan.output_dir, Path::new("runs/recipe"));
}

#[test]
fn a_typo_is_named_with_its_line_and_the_nearest_key() {
    let desk = Desk::new();
    let text = desk.recipe("\ntrain:\n  learning_rte: 1e-4\n");
    assert_eq!(
        desk.faults(&text, &[]),
        ["recipe.yaml:6: train.learning_rte: unknown key; did you mean train.learning_rate?"]
    );
    let text = desk.recipe("adapter: {learning_rate: 1e-4}\n");
    assert_eq!(
        desk.faults(&text, &[]),
        ["recipe.yaml:4: adapter.learning_rate: unknown key; did you mean train.learning_rate?"]
    );
    let text = desk.recipe("learning_rate: 1e-4\n");
    assert_eq!(
        desk.faults(&text, &[]),
        ["recipe.yaml:4: learning_rate: unknown key; did you mean train.learning_rate?"]
    );
    let text = desk.recipe("train.seed: 1\n");
    assert_eq!(
        desk.faults(&text, &[]),
        ["recipe.yaml:4: train.seed: unknown key; write `seed:` indented under `train:`"]
    );
    let text = desk.recipe("trian: {sed: 1}\n");
    assert_eq!(
        desk.faults(&text, &[]),
        [
            "recipe.yaml:4: trian: unknown section; did you mean train?",
            "recipe.yaml:4: train.sed: unknown key; did you mean train.seed?"
        ]
    );
}

#[test]
fn all_faults_come_at_once_in_order() {
    let desk = Desk::new();
    let text = "\
base:
  modle: m            # a typo, so base.model is not missed a second time
data:
  format: alpacca
  max_seq_len: -4
  validation:
    - rows.jsonl
    - 3
adapter:
  rank: 2.5
  r: 4
  dropout: 1
train:
  learning_rate: .nan
  seed: yes
  micro_batch_size: 99999999999999999999
  lr_scheduler: Cosine
sample: 3
";
    let faults = desk.faults(text, &["train.adam_beta1=2", "train.lr=1"]);
    let begins = [
        "recipe.yaml:2: base.modle: unknown key; did you mean base.model?",
        "recipe.yaml:3: data.train: is missing, expected a file, a directory, a pattern or `hf://owner/name`, or a list of such; add `train: …` under `data:`",
        "recipe.yaml:4: data.format: found the text `alpacca`, expected `auto`, `messages`, `sharegpt`, `alpaca`, `prompt_completion`, `text`, `tokens` or `preference`; did you mean `alpaca`?",
        "recipe.yaml:5: data.max_seq_len: found `-4`, expected a whole number from 2 to 16777216; the default is 1024",
        "recipe.yaml:7: data.validation[0]: `rows.jsonl` does not exist, expected a file, a directory, a pattern or `hf://owner/name`; paths start from the current directory",
        "recipe.yaml:8: data.validation[1]: found `3`, expected a file, a directory, a pattern or `hf://owner/name`; put it in quotes if it is meant as text",
        "recipe.yaml:10: adapter.rank: found `2.5`, expected a whole number from 1 to 65536; the default is 16",
        "recipe.yaml:11: adapter.rank: is given twice, `r` is another name for it; keep one",
        "recipe.yaml:12: adapter.dropout: found `1`, expected a number from 0, below 1",
        "recipe.yaml:14: train.learning_rate: found `NaN`, expected a number above 0, at most 1; the default is 2e-4",
        "recipe.yaml:15: train.seed: found the text `yes`, expected a whole number",
        "recipe.yaml:16: train.micro_batch_size: found `99999999999999999999`, expected a whole number from 1 to 65536",
        "recipe.yaml:17: train.lr_scheduler: found the text `Cosine`, expected `constant`, `linear` or `cosine`; did you mean `cosine`?",
        "recipe.yaml:18: sample: found `3`, expected a map of knobs; indent the knobs under `sample:`, one a line",
        "--set train.adam_beta1=2: found `2`, expected a number from 0, below 1; the default is 0.9",
        "--set train.lr=1: unknown key; did you mean train.learning_rate?",
    ];
    assert_eq!(faults.len(), begins.len(), "{faults:#?}");
    for (fault, begin) in faults.iter().zip(begins) {
        assert!(fault.starts_with(begin), "{fault}\n{begin}");
    }
}

#[test]
fn knobs_that_contradict_each_other_are_reported() {
    let desk = Desk::new();
    let text = desk.recipe(&format!(
        "  validation: {}
  validation_fraction: 0.1
base2: 1
adapter: {{method: full, rank: 8}}
train:
  num_epochs: 3
  max_steps: 10
  warmup_steps: 20
  warmup_ratio: 0.1
  early_stopping_patience: 2
",
        desk.path("rows.jsonl").display()
    ));
    assert_eq!(
        desk.faults(&text, &[]),
        [
            "recipe.yaml:5: data.validation_fraction: has no effect: `data.validation` is given too and replaces it; remove one of them",
            "recipe.yaml:6: base2: unknown key; did you mean base?",
            "recipe.yaml:7: adapter.rank: has no effect: `adapter.method: full` trains all weights and has no adapter; remove one of them",
            "recipe.yaml:9: train.num_epochs: has no effect: `train.max_steps` is given too and replaces it; remove one of them",
            "recipe.yaml:11: train.warmup_steps: found 20, more than all 10 steps of train.max_steps; warm up for fewer",
            "recipe.yaml:12: train.warmup_ratio: has no effect: `train.warmup_steps` is given too and replaces it; remove one of them",
            "recipe.yaml:13: train.early_stopping_patience: needs evaluations during the run; set train.eval_steps above 0",
        ]
    );
    let faults = desk.faults(&desk.recipe("train: {early_stopping_patience: 2}"), &[]);
    assert!(faults[0].contains("needs validation rows"), "{faults:?}");

    let adapter = desk.0.path().display().to_string();
    let text = desk.recipe(&format!("adapter: {{init_from: {adapter}, r: 8}}\n"));
    let faults = desk.faults(&text, &[]);
    assert_eq!(faults.len(), 1);
    assert!(faults[0].contains("adapter.rank: has no effect: the configuration of"));

    let faults = desk.faults(&desk.recipe(""), &["base.init=random"]);
    assert!(
        faults[0].ends_with("set `adapter.method: full`"),
        "{faults:?}"
    );
    let text = desk
        .recipe("adapter: {target_modules: 'model\\.layers\\.0\\..*', layers_to_transform: [0]}\n");
    assert!(desk.faults(&text, &[])[0].contains("regular expression"));
}

#[test]
fn a_set_overrules_the_file() {
    let desk = Desk::new();
    let text = desk.recipe("train: {num_epochs: 3}\nadapter: {rank: 4, alpha: 8}\n");
    let plan = desk.plan(&text, &["train.max_steps=7", "adapter.r=64", "adapter.r=2"]);
    assert_eq!(plan.train.max_steps, Some(7));
    assert_eq!(plan.train.num_epochs, 1.0);
    assert_eq!(plan.adapter.rank, 2);
    let plan = desk.plan(&text, &["adapter.method=full", "base.init=random"]);
    assert_eq!(plan.adapter.method, AdapterMethod::Full);
    let plan = desk.plan(
        &desk.recipe("train: {max_steps: 5}"),
        &["train.num_epochs=2"],
    );
    assert_eq!((plan.train.max_steps, plan.train.num_epochs), (None, 2.0));
    let plan = desk.plan(&text, &["train.num_epochs=", "output_dir=a b"]);
    assert_eq!(plan.train.num_epochs, 1.0);
    assert_eq!(plan.output_dir, Path::new("a b"));
    // A value that is wrong in the file does not matter once it is replaced.
    let text = desk.recipe("adapter: {rank: lots}\n");
    assert_eq!(desk.plan(&text, &["adapter.rank=3"]).adapter.rank, 3);
}

#[test]
fn a_bad_set_says_what_is_wrong() {
    let desk = Desk::new();
    let text = desk.recipe("");
    let faults = desk.faults(
        &text,
        &[
            "train.seed",
            "train=1",
            "data.train=none.jsonl",
            "sample.prompts=[x",
            "nothing.like.it=1",
        ],
    );
    assert_eq!(faults.len(), 5, "{faults:#?}");
    assert_eq!(
        faults[0],
        "--set train.seed: has no `=`; write --set key=value, for example --set train.max_steps=100"
    );
    assert!(
        faults[1].starts_with("--set train=1: is a section, expected a knob; set one knob of it")
    );
    assert!(
        faults[2].starts_with(
            "--set data.train=none.jsonl: `none.jsonl` does not exist, expected a file"
        )
    );
    assert!(faults[3].starts_with("--set sample.prompts=[x: the value is not YAML: "));
    assert!(faults[4].starts_with("--set nothing.like.it=1: unknown key; the sections are base"));
}

#[test]
fn values_may_be_written_in_more_than_one_way() {
    let desk = Desk::new();
    let text = desk.recipe(
        "\
adapter: {r: 1e1, alpha: '16', target_modules: q_proj, layers_to_transform: 3}
train: {learning_rate: \"2e-4\", max_steps: '100', num_epochs: ~, seed: 18446744073709551615}
sample: {prompts: Who are you?}
",
    );
    let plan = desk.plan(&text, &[]);
    assert_eq!((plan.adapter.rank, plan.adapter.alpha), (10, 16.0));
    assert_eq!(
        plan.adapter.target_modules,
        TargetModules::Names(vec!["q_proj".into()])
    );
    assert_eq!(plan.adapter.layers_to_transform, Some(vec![3]));
    assert_eq!(plan.train.learning_rate, 2e-4);
    assert_eq!(plan.train.max_steps, Some(100));
    assert_eq!(plan.train.seed, u64::MAX);
    assert_eq!(plan.sample.prompts, ["Who are you?"]);
}

#[test]
fn patterns_keep_their_order_and_are_checked() {
    let desk = Desk::new();
    let text = desk.recipe("adapter:\n  rank_pattern:\n    z_proj: 4\n    a.*: 8\n");
    let plan = desk.plan(&text, &[]);
    assert_eq!(
        plan.adapter.rank_pattern,
        [("z_proj".into(), 4), ("a.*".into(), 8)]
    );
    let text = desk.recipe(
        "adapter:\n  rank_pattern:\n    z_proj: 4\n    z_proj: 8\n    'a[': 8\n    b: 0\n  target_modules: '(q|v'\n",
    );
    let faults = desk.faults(&text, &[]);
    assert_eq!(faults.len(), 4, "{faults:#?}");
    assert!(faults[0].starts_with("recipe.yaml:7: adapter.rank_pattern.z_proj: is given twice"));
    assert!(faults[1].starts_with(
        "recipe.yaml:8: adapter.rank_pattern.a[: `a[` is not a regular expression: unclosed character class"
    ));
    assert!(faults[2].starts_with("recipe.yaml:9: adapter.rank_pattern.b: found `0`"));
    assert!(faults[3].starts_with(
        "recipe.yaml:10: adapter.target_modules: `(q|v` is not a regular expression: unclosed group"
    ));
    for bad in [
        "all_linear",
        "All-Linear",
        "[]",
        "[q_proj, 3]",
        "{a: 1}",
        "''",
    ] {
        let text = desk.recipe(&format!("adapter: {{target_modules: {bad}}}\n"));
        assert_eq!(desk.faults(&text, &[]).len(), 1, "{bad}");
    }
}

#[test]
fn the_resolved_recipe_loads_to_the_same_plan() {
    let desk = Desk::new();
    let rows = desk.path("rows.jsonl");
    let rows = rows.display();
    let adapter = desk.0.path().display();
    let recipes = [
        desk.recipe(""),
        desk.recipe("train: {max_steps: 9, warmup_steps: 0, learning_rate: 1.25e-7}\n"),
        desk.recipe("adapter: {method: full}\nbase2:\n").replace("base2:\n", ""),
        desk.recipe(&format!("adapter: {{init_from: {adapter}}}\n")),
        desk.recipe(&format!(
            "  validation: [{rows}, {rows}]\n  chat_template: {rows}\n\
             adapter:\n  target_modules: '.*\\.layers\\.[01]\\..*(q|v)_proj'\n  rank_pattern: {{'z.*': 3, a: 4}}\n  \
             alpha_pattern: {{z: 0.5}}\n\
             train: {{early_stopping_patience: 3, eval_steps: 5, seed: 18446744073709551615}}\n\
             sample:\n  prompts: ['yes', '1', \"two\\nlines: \\u00e9 \\u0001 \\U0001F600\", '# no', ' x ']\n\
             output_dir: '007'\n"
        )),
        desk.recipe("  validation_fraction: 0.125\nadapter: {target_modules: [q_proj], layers_to_transform: [0, 2]}\n"),
    ];
    for recipe in recipes {
        let plan = desk.plan(&recipe, &[]);
        let resolved = to_yaml(&plan);
        assert_eq!(desk.plan(&resolved, &[]), plan, "{resolved}");
        // Every knob stands in it.
        for knob in schema::KNOBS {
            let (_, name) = knob.split();
            assert!(resolved.contains(&format!("{name}:")), "{name}\n{resolved}");
        }
    }
}

#[test]
fn what_is_no_recipe_is_a_clear_error_and_does_no_harm() {
    let desk = Desk::new();
    let said = |text: &[u8]| desk.shown(load(&desk.write(text), &[])).join("\n");
    let init = "`lorafit init` writes a recipe to start from";
    assert_eq!(said(b""), format!("recipe.yaml: is empty; {init}"));
    assert_eq!(
        said(b"# nothing\n"),
        format!("recipe.yaml: is empty; {init}")
    );
    assert_eq!(
        said(b"- a\n"),
        format!("recipe.yaml:1: found a list, expected sections such as `base:`; {init}")
    );
    assert!(said(b"base:\n\tmodel: x\n").contains("recipe.yaml:2: is indented with a tab"));
    assert!(said(b"base:\n  model: \xff\n").starts_with("recipe.yaml:2: is not UTF-8 text"));
    assert!(said(b"base: {}\n---\nbase: {}\n").contains("more than one YAML document"));
    assert!(said(b"base: !python/object {model: x}\n").contains("the YAML tag"));
    assert!(said(b"base: {model: !!int x}\n").contains("recipe.yaml:1"));
    assert!(said(b"? [a, b]\n: c\n1: 2\n~: 3\n").contains("unknown key"));
    assert!(said("[".repeat(5000).as_bytes()).contains("recipe.yaml"));
    assert!(said(&vec![b'a'; 2 << 20]).contains("larger than 1 MiB"));
    let many: String = (0..5000).map(|n| format!("k{n}: 1\n")).collect();
    assert!(said(many.as_bytes()).ends_with("more"));

    let faults = desk.shown(load(&desk.path("none.yaml"), &[]));
    assert!(faults[0].starts_with("none.yaml: there is no such recipe"));
    let faults = load(desk.0.path(), &[]).unwrap_err().to_string();
    assert!(faults.contains("is a directory, expected a YAML file"));
}

#[test]
fn the_table_of_knobs_is_the_plan() {
    let desk = Desk::new();
    let plan = serde_json::to_value(desk.plan(&desk.recipe(""), &[])).unwrap();
    let mut fields = BTreeSet::new();
    for (name, value) in plan.as_object().unwrap() {
        match value.as_object() {
            Some(section) => fields.extend(section.keys().map(|key| format!("{name}.{key}"))),
            None => {
                fields.insert(name.clone());
            }
        }
    }
    let knobs: BTreeSet<_> = schema::KNOBS
        .iter()
        .map(|knob| knob.key.to_owned())
        .collect();
    assert_eq!(knobs, fields);
    assert_eq!(schema::KNOBS.len(), knobs.len(), "a knob is declared twice");
}

#[test]
fn the_json_schema_has_every_knob() {
    let schema = schema::json_schema();
    for knob in schema::KNOBS {
        let (section, name) = knob.split();
        let property = match section {
            "" => &schema["properties"][name],
            _ => &schema["properties"][section]["properties"][name],
        };
        assert!(property["description"].is_string(), "{}", knob.key);
        let default = knob.default_text();
        assert!(
            property.get("default").is_some() || default.is_none() || knob.key == "output_dir",
            "{} has no default",
            knob.key
        );
    }
    assert_eq!(
        schema["properties"]["adapter"]["properties"]["r"],
        schema["properties"]["adapter"]["properties"]["rank"]
    );
    assert_eq!(
        schema["properties"]["train"]["properties"]["learning_rate"]["exclusiveMinimum"],
        0.0
    );
    assert_eq!(schema["properties"]["base"]["required"][0], "model");
}

#[test]
fn every_template_loads_also_with_its_defaults_uncommented() {
    let desk = Desk::new();
    let rows = desk.path("rows.jsonl").display().to_string();
    assert!(schema::commented_template("none").is_none());
    for name in schema::template_names() {
        let template = schema::commented_template(name).unwrap();
        for knob in schema::KNOBS {
            let (_, name) = knob.split();
            assert!(template.contains(&format!("{name}: ")), "{}", knob.key);
        }
        for line in template.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        let template = template
            .replace("data/train.jsonl", &rows)
            .replace("data/corpus.jsonl", &rows);
        desk.plan(&template, &[]);
    }
    let lora = schema::commented_template("lora").unwrap();
    let uncommented: String = lora
        .replace("data/train.jsonl", &rows)
        .lines()
        .map(|line| match line.trim_start().strip_prefix('#') {
            Some(knob) if !knob.starts_with(' ') => {
                format!("{}{knob}\n", &line[..line.len() - line.trim_start().len()])
            }
            _ => format!("{line}\n"),
        })
        .collect();
    desk.plan(&uncommented, &[]);
}

#[test]
fn the_recipes_of_the_project_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension() != Some("yaml".as_ref()) {
            continue;
        }
        let faults = load(&path, &[]).map_or_else(|faults| faults.list, |_| vec![]);
        // Data that a script makes is not in a fresh checkout.
        let made = "`datasets/generated/";
        let wrong = faults.iter().find(|f| !f.message.starts_with(made));
        assert!(wrong.is_none(), "{wrong:?}");
    }
}

#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/README.md");
    let page = fs::read_to_string(path).unwrap_or_default();
    assert!(
        page == schema::reference_markdown(),
        "recipes/README.md is out of date: run `lorafit schema --markdown > recipes/README.md`"
    );
}
