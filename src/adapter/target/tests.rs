use super::*;

pub(in crate::adapter) fn llama(layers: usize) -> Vec<String> {
    let parts = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"];
    let blocks = (0..layers).flat_map(|l| parts.map(|part| format!("model.layers.{l}.{part}")));
    blocks.chain(["lm_head".to_owned()]).collect()
}

fn targeting(target_modules: TargetModules) -> Targeting {
    Targeting {
        target_modules,
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        rank: 4,
        alpha: 8.0,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
        use_rslora: false,
        target_parameters: Vec::new(),
    }
}

pub(in crate::adapter) fn named(names: &[&str]) -> Targeting {
    targeting(TargetModules::Names(
        names.iter().map(|n| (*n).to_owned()).collect(),
    ))
}

pub(in crate::adapter) fn regex(pattern: &str) -> Targeting {
    targeting(TargetModules::Pattern(pattern.to_owned()))
}

pub(in crate::adapter) fn paths(targeting: &Targeting, linear: &[String]) -> Vec<String> {
    select(targeting, linear)
        .unwrap()
        .into_iter()
        .map(|adapter| adapter.module)
        .collect()
}

fn error(targeting: &Targeting) -> String {
    select(targeting, &llama(2)).unwrap_err().to_string()
}

#[test]
fn all_linear_leaves_out_the_head() {
    assert_eq!(paths(&regex("All-Linear"), &llama(2)), llama(2)[..6]);
}

#[test]
fn a_name_matches_after_a_dot_only() {
    assert_eq!(
        paths(&named(&["v_proj"]), &llama(1)),
        ["model.layers.0.self_attn.v_proj"]
    );
    assert!(error(&named(&["_proj"])).contains("no linear layer is called \"_proj\""));
}

#[test]
fn a_pattern_matches_the_whole_path() {
    assert_eq!(
        paths(&regex(r".*\.1\.(mlp|x)\..*"), &llama(2)),
        ["model.layers.1.mlp.up_proj"]
    );
    assert!(error(&regex("q_proj")).contains("matches no linear layer"));
}

#[test]
fn layers_filter_ends_but_not_whole_paths() {
    let mut t = named(&["q_proj", "model.layers.0.self_attn.v_proj"]);
    t.layers_to_transform = Some(vec![1]);
    let expected = [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    ];
    assert_eq!(paths(&t, &llama(2)), expected);
    t.layers_pattern = vec!["layers".to_owned()];
    assert_eq!(paths(&t, &llama(2)), expected);
    t.layers_pattern = vec!["h".to_owned()];
    assert!(select(&t, &llama(2)).is_err());
}

#[test]
fn an_expert_number_is_no_layer_number() {
    let linear = ["model.layers.1.mlp.experts.0.w1".to_owned()];
    let mut t = named(&["w1"]);
    t.layers_to_transform = Some(vec![0]);
    assert!(select(&t, &linear).is_err());
    t.layers_to_transform = Some(vec![1]);
    assert_eq!(paths(&t, &linear), linear);
}

#[test]
fn the_first_pattern_wins() {
    let mut t = named(&["q_proj", "v_proj"]);
    t.rank_pattern = vec![
        ("0.self_attn.q_proj".to_owned(), 2),
        ("q_proj".to_owned(), 16),
    ];
    t.alpha_pattern = vec!["v_proj|x".to_owned()]
        .into_iter()
        .map(|p| (p, 3.0))
        .collect();
    let found: Vec<_> = (select(&t, &llama(2)).unwrap().into_iter())
        .map(|adapter| (adapter.rank, adapter.scaling))
        .collect();
    assert_eq!(found, [(2, 4.0), (4, 0.75), (16, 0.5), (4, 0.75)]);
    t.use_rslora = true;
    assert_eq!(select(&t, &llama(2)).unwrap()[2].scaling, 2.0);
}

#[test]
fn excluded_modules_are_left_out() {
    let mut t = regex(ALL_LINEAR);
    t.exclude_modules = Some(TargetModules::Names(vec!["up_proj".to_owned()]));
    assert_eq!(paths(&t, &llama(1)), llama(1)[..2]);
    t.exclude_modules = Some(TargetModules::Pattern(".*_proj".to_owned()));
    assert!(error(&t).contains("leave no linear layer"), "{}", error(&t));
}

#[test]
fn all_faults_come_together_with_the_nearest_names() {
    let mut t = named(&["q_porj", "v_proj"]);
    t.layers_to_transform = Some(vec![0, 7]);
    t.rank_pattern = vec![("up_proj".to_owned(), 2)];
    let text = error(&t);
    for part in [
        "did you mean \"q_proj\"?",
        "layer 7; expected 0 to 1",
        "\"up_proj\" matches no adapted",
    ] {
        assert!(text.contains(part), "{part} not in {text}");
    }
    t.rank_pattern = vec![("(".to_owned(), 0)];
    let text = error(&t);
    assert!(
        text.contains("rank_pattern.(: found rank 0") && text.contains("unclosed group"),
        "{text}"
    );
}

#[test]
fn pythons_look_around_is_refused_by_name() {
    let text = error(&regex(r".*(?<!lm)_proj"));
    assert!(text.contains("look-around, back-references"), "{text}");
    let mut t = regex(".*_proj");
    t.layers_to_transform = Some(vec![0]);
    assert!(error(&t).contains("cannot be combined"));
}
