//! Which linear layers carry an adapter, and with what rank and scaling: PEFT's rules.
//!
//! The rules are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key` and
//! `_find_minimal_target_modules`), so that one choice means the same modules there and here:
//!
//! * `all-linear` is every linear layer but the output head;
//! * a list holds whole module paths or their ends (`q_proj` matches `model.layers.0.self_attn.q_proj`);
//! * any other string is a regular expression for the whole path;
//! * `layers_to_transform` keeps the modules whose first number in the path is listed; a whole
//!   path in the list is not filtered;
//! * keys of `rank_pattern` and `alpha_pattern` are regular expressions for the path's end, and the
//!   first that matches wins.
//!
//! Two things are stricter than PEFT: a listed name, layer or pattern that matches nothing is an
//! error, and one wider: `all-linear` may be combined with `layers_to_transform`.
//!
//! Regular expressions are those of the `regex` crate. Look-around (`(?=…)`, `(?!…)`, `(?<=…)`,
//! `(?<!…)`), back-references, atomic groups, possessive quantifiers and a literal unescaped `{`,
//! which Python takes, are refused with an error that says so.

use regex::Regex;

use super::target_fault::unused;
pub use super::target_fault::{TargetError, TargetFault};
pub use super::target_written::as_written;
use crate::model::names;
use crate::recipe::plan::{AdapterPlan, TargetModules};

/// The shorthand for every linear layer but the output head.
pub const ALL_LINEAR: &str = "all-linear";

/// The choice of modules, ranks and scalings, as recipes and `adapter_config.json` state it.
#[derive(Debug, Clone, PartialEq)]
pub struct Targeting {
    /// Which modules carry an adapter.
    pub target_modules: TargetModules,
    /// Which of them do not after all; never `all-linear`.
    pub exclude_modules: Option<TargetModules>,
    /// Layer indices; all when `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the module lists that the layer index counts in; any when empty.
    pub layers_pattern: Vec<String>,
    /// Rank R where no pattern matches.
    pub rank: usize,
    /// LoRA alpha where no pattern matches.
    pub alpha: f64,
    /// Module pattern → rank, first match wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// Module pattern → alpha, first match wins.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Whether the scaling is `alpha / sqrt(rank)` (arXiv 2312.03732).
    pub use_rslora: bool,
}

impl Targeting {
    /// Every linear layer but the output head, all with one rank and alpha.
    pub fn all_linear(rank: usize, alpha: f64) -> Self {
        Self {
            target_modules: TargetModules::Pattern(ALL_LINEAR.to_owned()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank,
            alpha,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
        }
    }
}

impl From<&AdapterPlan> for Targeting {
    fn from(plan: &AdapterPlan) -> Self {
        Self {
            target_modules: plan.target_modules.clone(),
            exclude_modules: plan.exclude_modules.clone(),
            layers_to_transform: plan.layers_to_transform.clone(),
            layers_pattern: Vec::new(),
            rank: plan.rank,
            alpha: plan.alpha,
            rank_pattern: plan.rank_pattern.clone(),
            alpha_pattern: plan.alpha_pattern.clone(),
            use_rslora: plan.use_rslora,
        }
    }
}

/// One module that carries an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleAdapter {
    /// Module path, as in `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// R.
    pub rank: usize,
    /// LoRA alpha.
    pub alpha: f64,
    /// What `B·A` is multiplied by: `alpha / R`, or `alpha / sqrt(R)` with rank-stabilised LoRA.
    pub scaling: f64,
}

/// A [`Targeting`] with its regular expressions compiled.
#[derive(Debug, Clone)]
pub struct Matcher {
    pub(super) targets: Rule,
    pub(super) excluded: Option<Rule>,
    /// Layer indices kept and the expressions that find an index, tried in order.
    pub(super) layers: Option<(Vec<usize>, Vec<Regex>)>,
    rank: usize,
    alpha: f64,
    pub(super) ranks: Vec<(Regex, usize)>,
    pub(super) alphas: Vec<(Regex, f64)>,
    use_rslora: bool,
}

/// How one knob names modules.
#[derive(Debug, Clone)]
pub(super) enum Rule {
    AllLinear,
    Whole(Regex),
    Ends(Vec<String>),
}

impl Rule {
    fn new(key: &'static str, modules: &TargetModules) -> Result<Self, TargetFault> {
        match modules {
            TargetModules::Pattern(p) if p.eq_ignore_ascii_case(ALL_LINEAR) => Ok(Self::AllLinear),
            TargetModules::Pattern(p) => {
                Ok(Self::Whole(compile(key, p, &format!(r"\A(?:{p})\z"))?))
            }
            TargetModules::Names(names) => Ok(Self::Ends(names.clone())),
        }
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => !ends_with(module, names::HEAD),
            Self::Whole(regex) => regex.is_match(module),
            Self::Ends(names) => names.iter().any(|name| ends_with(module, name)),
        }
    }

    /// Whether the module is named in full, which PEFT exempts from `layers_to_transform`.
    fn names_whole(&self, module: &str) -> bool {
        matches!(self, Self::Ends(names) if names.iter().any(|name| name == module))
    }
}

/// Whether `name` is the path or its end after a dot.
pub(super) fn ends_with(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

fn compile(key: &'static str, pattern: &str, anchored: &str) -> Result<Regex, TargetFault> {
    // The pattern alone first: its error then shows what the user wrote.
    Regex::new(pattern)
        .and_then(|_| Regex::new(anchored))
        .map_err(|error| TargetFault::Pattern {
            key,
            pattern: pattern.to_owned(),
            cause: short_cause(&error),
        })
}

/// The last line of a regex error; the lines before it repeat the pattern.
fn short_cause(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default().trim();
    last.trim_start_matches("error: ").to_owned()
}

impl Matcher {
    /// Compiles the regular expressions and checks what needs no model.
    ///
    /// # Errors
    /// Every expression that does not compile, ranks of 0, and knobs that exclude one another.
    pub fn new(targeting: &Targeting) -> Result<Self, TargetError> {
        let mut faults = Vec::new();
        check_knobs(targeting, &mut faults);
        let targets = keep(
            Rule::new("target_modules", &targeting.target_modules),
            &mut faults,
        );
        let excluded = (targeting.exclude_modules.as_ref())
            .and_then(|modules| keep(Rule::new("exclude_modules", modules), &mut faults));
        let layers = (layers_of(targeting)).map(|layers| {
            let regexes = layer_regexes(&targeting.layers_pattern, &mut faults);
            (layers.to_vec(), regexes)
        });
        let ranks = pattern_regexes("rank_pattern", &targeting.rank_pattern, &mut faults);
        let alphas = pattern_regexes("alpha_pattern", &targeting.alpha_pattern, &mut faults);
        match targets {
            Some(targets) if faults.is_empty() => Ok(Self {
                targets,
                excluded,
                layers,
                rank: targeting.rank,
                alpha: targeting.alpha,
                ranks,
                alphas,
                use_rslora: targeting.use_rslora,
            }),
            _ => Err(TargetError { faults }),
        }
    }

    /// Whether this linear layer carries an adapter.
    pub fn selects(&self, module: &str) -> bool {
        if self
            .excluded
            .as_ref()
            .is_some_and(|rule| rule.matches(module))
        {
            return false;
        }
        self.targets.matches(module)
            && (self.targets.names_whole(module) || self.layer_is_kept(module))
    }

    fn layer_is_kept(&self, module: &str) -> bool {
        match &self.layers {
            None => true,
            Some((kept, regexes)) => {
                layer_index(regexes, module).is_some_and(|index| kept.contains(&index))
            }
        }
    }

    /// Rank and scaling of a module's adapter, selected or not.
    pub fn adapter(&self, module: &str) -> ModuleAdapter {
        let rank = first_match(&self.ranks, module).unwrap_or(self.rank);
        let alpha = first_match(&self.alphas, module).unwrap_or(self.alpha);
        let divisor = if self.use_rslora {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        ModuleAdapter {
            module: module.to_owned(),
            rank,
            alpha,
            scaling: alpha / divisor,
        }
    }
}

/// The layer filter, where there is one; PEFT takes an empty list for none.
fn layers_of(targeting: &Targeting) -> Option<&[usize]> {
    targeting
        .layers_to_transform
        .as_deref()
        .filter(|layers| !layers.is_empty())
}

fn check_knobs(targeting: &Targeting, faults: &mut Vec<TargetFault>) {
    let is_regex = matches!(&targeting.target_modules,
        TargetModules::Pattern(p) if !p.eq_ignore_ascii_case(ALL_LINEAR));
    if is_regex && layers_of(targeting).is_some() {
        faults.push(TargetFault::LayersWithPattern {
            key: "layers_to_transform",
        });
    }
    if !targeting.layers_pattern.is_empty() && targeting.layers_to_transform.is_none() {
        faults.push(TargetFault::LayersPatternAlone);
    }
    if targeting.rank == 0 {
        faults.push(TargetFault::ZeroRank {
            key: "rank".to_owned(),
        });
    }
    for (pattern, rank) in &targeting.rank_pattern {
        if *rank == 0 {
            faults.push(TargetFault::ZeroRank {
                key: format!("rank_pattern.{pattern}"),
            });
        }
    }
}

fn keep<T>(result: Result<T, TargetFault>, faults: &mut Vec<TargetFault>) -> Option<T> {
    result.map_err(|fault| faults.push(fault)).ok()
}

/// PEFT 0.21: the first numbered segment, so that an expert's number is not taken for a layer's.
fn layer_regexes(patterns: &[String], faults: &mut Vec<TargetFault>) -> Vec<Regex> {
    let key = "layers_pattern";
    let any = ["[^.]*".to_owned()];
    let named = !patterns.is_empty();
    let patterns = if named { patterns } else { &any };
    (patterns.iter())
        .filter_map(|p| {
            let head = if named { r"\A(?:.*?\.)?" } else { r"\A.*?\." };
            keep(
                compile(key, p, &format!(r"{head}(?:{p})\.(?P<idx>\d+)\.")),
                faults,
            )
        })
        .collect()
}

/// The first number that an expression finds.
pub(super) fn layer_index(regexes: &[Regex], module: &str) -> Option<usize> {
    let found = regexes.iter().find_map(|regex| regex.captures(module))?;
    found.name("idx")?.as_str().parse().ok()
}

fn pattern_regexes<T: Copy>(
    key: &'static str,
    patterns: &[(String, T)],
    faults: &mut Vec<TargetFault>,
) -> Vec<(Regex, T)> {
    (patterns.iter())
        .filter_map(|(p, value)| {
            let regex = compile(key, p, &format!(r"\A(?:.*\.)?(?:{p})\z"));
            keep(regex, faults).map(|regex| (regex, *value))
        })
        .collect()
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns
        .iter()
        .find(|(regex, _)| regex.is_match(module))
        .map(|(_, value)| *value)
}

/// The adapters that a choice puts on a model, in the order of `linear_modules`.
///
/// `linear_modules` are the paths of all its linear layers, the output head included.
///
/// # Errors
/// Everything wrong with the choice: what [`Matcher::new`] finds, and names, layers and patterns
/// that match nothing, each with the nearest names there are.
pub fn select(
    targeting: &Targeting,
    linear_modules: &[String],
) -> Result<Vec<ModuleAdapter>, TargetError> {
    let matcher = Matcher::new(targeting)?;
    let selected: Vec<ModuleAdapter> = (linear_modules.iter())
        .filter(|module| matcher.selects(module))
        .map(|module| matcher.adapter(module))
        .collect();
    let faults = unused(targeting, &matcher, linear_modules, &selected);
    if faults.is_empty() {
        Ok(selected)
    } else {
        Err(TargetError { faults })
    }
}

#[cfg(test)]
pub(super) mod tests {
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
}
