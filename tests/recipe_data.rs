//! What a recipe may say of its data.

use lorafit::recipe::load::load;
use lorafit::recipe::plan::{DataFormat, Packing, SampleBy};
use lorafit::recipe::resolve::to_yaml;
use lorafit::recipe::{Plan, schema};
use serde_json::json;

use crate::fixture::{RECIPE, Workspace};

/// The plan of the workspace's recipe with `data.KEY=VALUE`, where `ROWS` is its data file.
fn plan(workspace: &Workspace, sets: &[&str]) -> Result<Plan, String> {
    let at = |name: &str| workspace.path(name).display().to_string();
    let recipe = RECIPE.replace("base\n", &(at("base") + "\n"));
    workspace.write(
        "recipe.yaml",
        &recipe.replace("data.jsonl", &at("data.jsonl")),
    );
    let set = |set: &&str| format!("data.{set}").replace("ROWS", &at("data.jsonl"));
    let sets: Vec<String> = sets.iter().map(set).collect();
    load(&workspace.path("recipe.yaml"), &sets).map_err(|faults| faults.to_string())
}

#[test]
fn a_source_is_a_path_or_a_map() {
    let workspace = Workspace::new();
    let train = "train=[ROWS, {path: ROWS, format: text, weight: 0.5, fields: {text: body}, sample_by: paragraph}, {path: hf://o/n, config: c, split: s, revision: r}]";
    let plan = plan(&workspace, &[train]).unwrap();
    let [plain, mapped, hub] = &plan.data.train[..] else {
        panic!("{:?}", plan.data.train);
    };
    assert_eq!((plain.weight, plain.format), (1.0, None));
    assert_eq!(
        (mapped.weight, mapped.format),
        (0.5, Some(DataFormat::Text))
    );
    assert_eq!(mapped.fields["text"], "body");
    assert_eq!(mapped.sample_by, SampleBy::Paragraph);
    let names = [&hub.config, &hub.split, &hub.revision].map(|name| name.as_deref());
    assert_eq!(names, [Some("c"), Some("s"), Some("r")]);
    // And back.
    workspace.write("resolved.yaml", &to_yaml(&plan));
    assert_eq!(load(&workspace.path("resolved.yaml"), &[]).unwrap(), plan);
}

#[test]
fn packing_is_a_boolean_or_wrap() {
    let workspace = Workspace::new();
    for (word, want) in [
        ("true", Packing::On),
        ("false", Packing::Off),
        ("wrap", Packing::Wrap),
    ] {
        let plan = plan(&workspace, &[&format!("packing={word}")]).unwrap();
        assert_eq!(plan.data.packing, want);
        let yaml = to_yaml(&plan);
        assert!(yaml.contains(&format!("  packing: {word}\n")), "{yaml}");
    }
    let schema = schema::json_schema();
    let packing = &schema["properties"]["data"]["properties"]["packing"];
    assert_eq!(packing["default"], json!(false));
    assert_eq!(packing["enum"], json!([false, true, "wrap", null]));
}

#[test]
fn what_is_wrong_with_a_source_is_said() {
    let workspace = Workspace::new();
    for (set, want) in [
        ("train={path: ROWS, wieght: 2}", "did you mean weight?"),
        ("train={path: ROWS, weight: 0}", "a number above 0"),
        ("train={weight: 2}", "path"),
        ("train={path: ROWS, split: train}", "hf://"),
        ("train=hf://name", "hf://owner/name"),
        ("train=ROWS*.none", "no file matches"),
        ("waive=[eos]", "end_of_turn"),
        ("shuffle_buffer=0", "a whole number from 1"),
        ("chat_template=qwen-3", "did you mean `qwen3`?"),
    ] {
        let faults = plan(&workspace, &[set]).unwrap_err();
        assert!(faults.contains(want), "{set}: {faults}\n  lacks {want}");
    }
}
