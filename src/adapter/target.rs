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
    /// Parameters that carry an adapter though they are no linear layer's, by the ends of their
    /// names: the experts' `mlp.experts.gate_up_proj`, a router's `gate.weight`.
    pub target_parameters: Vec<String>,
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
            target_parameters: Vec::new(),
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
            target_parameters: plan.target_parameters.clone().unwrap_or_default(),
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
    parameters: Vec<String>,
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
            Self::AllLinear => ![names::HEAD, names::EMBEDDING].contains(&module),
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
                parameters: targeting.target_parameters.clone(),
            }),
            _ => Err(TargetError { faults }),
        }
    }

    /// Whether this linear layer, router or expert layer carries an adapter.
    pub fn selects(&self, module: &str) -> bool {
        let by_name = |parameter: &str| {
            let mut ends = self.parameters.iter();
            ends.any(|end| ends_with(parameter, end))
        };
        if let Some(parameter) = names::parameter_of(module) {
            return by_name(&parameter);
        }
        if by_name(&format!("{module}.weight")) {
            return true;
        }
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
        let parameter = names::parameter_of(module);
        let name = parameter.as_deref().unwrap_or(module);
        let rank = first_match(&self.ranks, name).unwrap_or(self.rank);
        let alpha = first_match(&self.alphas, name).unwrap_or(self.alpha);
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
pub(super) mod tests;
