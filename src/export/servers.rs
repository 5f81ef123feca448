//! Which servers load an adapter, and why one does not.
//!
//! `RULES` (in `server_rules`) hold what an adapter's `adapter_config.json` and its modules can ask
//! of a server against what the server's source says; [`findings`] applies them to one adapter and
//! [`table`] makes the README's table of them. Whether a server knows the model's family at all is
//! not asked here.
//!
//! Merging is the way out of every refusal: a merged model is a plain one.

use serde::Serialize;
use serde_json::Value;

use super::server_rules::RULES;

/// Servers with the same rules. Ollama hands GGUF adapters to llama.cpp (`--lora` in its
/// `llm/llama_server.go`); of directories it converts those of Llama and Gemma 2 alone, and the
/// former wrongly (its `convert/convert_llama_adapter.go` regroups the rows of lora_A, not of lora_B).
pub const SERVERS: [&[&str]; 3] = [&["vLLM"], &["llama.cpp", "Ollama"], &["MLX"]];

/// The versions whose sources were read.
pub const VERSIONS: &str = "vLLM 0.33.0, llama.cpp 0c1e570, Ollama fb30760 and mlx-lm 0.32.2";

/// What a server does with an adapter; the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It loads it.
    Loads,
    /// It loads it if asked in one way.
    LoadsWith,
    /// It loads it without a word and computes something else than PEFT.
    Misreads,
    /// It stops with an error.
    Refuses,
}

/// What can make a server stumble.
#[derive(Debug, Clone)]
pub struct Adapter<'a> {
    /// Its `adapter_config.json`.
    pub config: Value,
    /// Paths that carry adapters, as `model.layers.0.self_attn.q_proj`.
    pub modules: Vec<&'a str>,
    /// Whether the file has biases of the base.
    pub has_biases: bool,
    /// `model_type` of the base.
    pub model_type: &'a str,
    /// Whether the base's output head is its embedding.
    pub tied_head: bool,
}

impl Adapter<'_> {
    /// Whether a key of the configuration is on.
    pub(super) fn sets(&self, key: &str) -> bool {
        match &self.config[key] {
            Value::Bool(on) => *on,
            Value::String(text) => !text.is_empty() && text != "none",
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            _ => false,
        }
    }

    /// Whether the last part of a module's path is one of `names`.
    pub(super) fn is_on(&self, names: &[&str]) -> bool {
        let mut ends = self
            .modules
            .iter()
            .filter_map(|path| path.rsplit('.').next());
        ends.any(|end| names.contains(&end))
    }

    /// The largest rank.
    pub(super) fn rank(&self) -> u64 {
        let pattern = self.config["rank_pattern"].as_object();
        let ranks = pattern.into_iter().flat_map(|map| map.values());
        let ranks = ranks.chain([&self.config["r"]]);
        ranks.filter_map(Value::as_u64).max().unwrap_or_default()
    }
}

/// What a server makes of a choice.
#[derive(Clone, Copy)]
pub(super) struct Verdict {
    pub effect: Effect,
    /// In a cell of the table.
    pub cell: &'static str,
    pub why: &'static str,
    pub remedy: fn(&Adapter) -> String,
}

/// The families that a rule is about.
pub(super) enum Families {
    All,
    Only(&'static [&'static str]),
    Except(&'static [&'static str]),
}

/// A choice and what servers make of it.
pub(super) struct Rule {
    pub choice: &'static str,
    pub families: Families,
    pub holds: fn(&Adapter) -> bool,
    /// In the order of [`SERVERS`].
    pub verdicts: [Verdict; 3],
}

impl Rule {
    fn applies(&self, adapter: &Adapter) -> bool {
        let is_listed = |families: &[&str]| families.contains(&adapter.model_type);
        let of_family = match self.families {
            Families::All => true,
            Families::Only(families) => is_listed(families),
            Families::Except(families) => !is_listed(families),
        };
        of_family && (self.holds)(adapter)
    }
}

/// Why servers do not simply load an adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// Which servers.
    pub servers: &'static [&'static str],
    /// What they do instead.
    pub effect: Effect,
    /// Because of what.
    pub choice: &'static str,
    /// How they load it after all, where they do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub how: Option<&'static str>,
    /// The reason.
    pub why: &'static str,
    /// What to do.
    pub remedy: String,
}

/// What servers do with an adapter that they do not simply load, in the order of [`SERVERS`].
///
/// Of one server only the worst is listed: who refuses an adapter need not hear how else to load it.
pub fn findings(adapter: &Adapter) -> Vec<Finding> {
    let rules: Vec<&Rule> = RULES.iter().filter(|rule| rule.applies(adapter)).collect();
    let of_servers = |(at, servers): (usize, &&'static [&'static str])| {
        let effects = rules.iter().map(|rule| rule.verdicts[at].effect);
        let worst = effects.max().unwrap_or(Effect::Loads);
        let found = |rule: &&Rule| {
            let Verdict {
                effect,
                cell,
                why,
                remedy,
            } = rule.verdicts[at];
            (effect == worst && effect != Effect::Loads).then(|| Finding {
                servers,
                effect,
                choice: rule.choice,
                how: (effect == Effect::LoadsWith).then_some(cell),
                why,
                remedy: remedy(adapter),
            })
        };
        rules.iter().filter_map(found).collect::<Vec<_>>()
    };
    SERVERS.iter().enumerate().flat_map(of_servers).collect()
}

/// The README's table: a row for each rule, a column for each kind of server.
///
/// The first rule is about every adapter, so no other cell promises more than its.
pub fn table() -> String {
    let heads = SERVERS.map(|servers| servers.join(", ")).join(" | ");
    let mut table = format!("| adapter | {heads} |\n|---|---|---|---|\n");
    for rule in RULES {
        let families = match rule.families {
            Families::All => String::new(),
            Families::Only(families) => format!(" of {}", families.join(", ")),
            Families::Except(families) => format!(", but for {}", families.join(", ")),
        };
        let cell = |at: usize| {
            let every = RULES[0].verdicts[at];
            match rule.verdicts[at] {
                own if own.effect > every.effect => own.cell,
                _ => every.cell,
            }
        };
        let cells = [0, 1, 2].map(cell).join(" | ");
        table += &format!("| {}{families} | {cells} |\n", rule.choice);
    }
    table
}

#[cfg(test)]
mod tests {
    use Effect::{Loads, LoadsWith, Misreads, Refuses};
    use serde_json::json;

    use super::*;

    /// An adapter on q_proj and `modules`, rank 8 and alpha 16, with `keys` in its configuration.
    fn adapter<'a>(model_type: &'a str, modules: &[&'a str], keys: Value) -> Adapter<'a> {
        let mut config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none",
            "use_dora": false, "rank_pattern": {}, "init_lora_weights": true});
        let changes = keys.as_object().cloned().unwrap_or_default();
        config.as_object_mut().unwrap().extend(changes);
        Adapter {
            config,
            modules: [&["model.layers.0.self_attn.q_proj"], modules].concat(),
            has_biases: false,
            model_type,
            tied_head: false,
        }
    }

    /// What vLLM and llama.cpp do; MLX always refuses.
    fn effects(adapter: &Adapter) -> [Effect; 2] {
        let found = findings(adapter);
        let of = |servers: &[&str]| {
            let mut effects = found.iter().filter(|finding| finding.servers == servers);
            effects.next().map_or(Loads, |finding| finding.effect)
        };
        assert_eq!(of(SERVERS[2]), Refuses);
        [of(SERVERS[0]), of(SERVERS[1])]
    }

    #[test]
    fn each_setting_has_its_effects() {
        let cases = [
            (json!({}), [Loads, LoadsWith]),
            (json!({"r": 16}), [Loads, LoadsWith]),
            (json!({"r": 17}), [LoadsWith, LoadsWith]),
            (
                json!({"rank_pattern": {"q_proj": 512}}),
                [LoadsWith, LoadsWith],
            ),
            (
                json!({"rank_pattern": {"q_proj": 513}}),
                [Refuses, LoadsWith],
            ),
            (json!({"use_rslora": true}), [Loads, Misreads]),
            (json!({"alpha_pattern": {"q_proj": 3.5}}), [Loads, Misreads]),
            (
                json!({"use_dora": true, "use_rslora": true}),
                [Refuses, Refuses],
            ),
            (json!({"peft_type": "VERA"}), [Refuses, Refuses]),
            (json!({"bias": "all"}), [Refuses, LoadsWith]),
            (
                json!({"modules_to_save": ["norm", "input_layernorm"]}),
                [Refuses, Misreads],
            ),
            (
                json!({"modules_to_save": ["norm", "q_norm"]}),
                [Refuses, Refuses],
            ),
            (json!({"modules_to_save": ["lm_head"]}), [Refuses, Refuses]),
            (json!({"trainable_token_indices": [5]}), [Refuses, Refuses]),
            (
                json!({"init_lora_weights": "pissa_niter_4"}),
                [Refuses, Misreads],
            ),
            (json!({"init_lora_weights": "gaussian"}), [Loads, LoadsWith]),
        ];
        for (keys, expected) in cases {
            let found = effects(&adapter("llama", &[], keys.clone()));
            assert_eq!(found, expected, "{keys}");
        }
        let biases = Adapter {
            has_biases: true,
            ..adapter("qwen2", &[], json!({"bias": "all"}))
        };
        assert_eq!(effects(&biases), [Refuses, Refuses]);
    }

    #[test]
    fn each_module_has_its_effects() {
        let (head, embedding) = ("lm_head", "model.embed_tokens");
        let (experts, router) = ("m.0.mlp.experts.down_proj", "m.0.mlp.gate");
        let cases = [
            ("llama", head, false, [Loads, LoadsWith]),
            ("llama", head, true, [Loads, Refuses]),
            ("qwen2", head, false, [Refuses, LoadsWith]),
            ("gemma2", head, true, [Refuses, Misreads]),
            ("phi", head, false, [Refuses, Refuses]),
            ("cohere", embedding, false, [Loads, LoadsWith]),
            ("qwen2", embedding, false, [Refuses, LoadsWith]),
            ("qwen3", embedding, true, [Loads, Refuses]),
            ("qwen3_moe", experts, false, [LoadsWith, Refuses]),
            ("gpt_oss", experts, false, [Loads, Refuses]),
            ("mixtral", experts, false, [Misreads, Refuses]),
            ("mixtral", router, false, [Misreads, LoadsWith]),
            ("qwen3_moe", router, false, [Loads, LoadsWith]),
            (
                "qwen2_moe",
                "m.0.mlp.shared_expert.up_proj",
                false,
                [Loads, LoadsWith],
            ),
            (
                "deepseek_v3",
                "m.0.self_attn.kv_b_proj",
                false,
                [Loads, Refuses],
            ),
            (
                "qwen3_next",
                "m.0.linear_attn.in_proj_qkvz",
                false,
                [Loads, Refuses],
            ),
        ];
        for (model_type, module, tied_head, expected) in cases {
            let adapter = Adapter {
                tied_head,
                ..adapter(model_type, &[module], json!({}))
            };
            assert_eq!(effects(&adapter), expected, "{module} of {model_type}");
        }
    }

    #[test]
    fn a_remedy_fits_the_adapter() {
        let remedies = |keys: Value| {
            let found = findings(&adapter("llama", &[], keys)).into_iter();
            found.map(|finding| finding.remedy).collect::<Vec<_>>()
        };
        assert!(remedies(json!({"r": 17}))[0].contains("--max-lora-rank 32"));
        assert!(remedies(json!({"r": 257}))[0].contains("--max-lora-rank 320"));
        // 16·√8.
        let rslora = &remedies(json!({"use_rslora": true}))[0];
        assert!(rslora.contains("adapter.alpha: 45.254834 "), "{rslora}");
        let ranks = json!({"use_rslora": true, "rank_pattern": {"q_proj": 4}});
        assert!(!remedies(ranks)[0].contains("adapter.alpha"));
        let refused = remedies(json!({"use_dora": true}));
        assert!(
            refused
                .iter()
                .all(|remedy| remedy.contains("lorafit merge"))
        );
    }

    #[test]
    fn the_readme_has_this_table() {
        let readme = include_str!("../../README.md");
        let table = table();
        assert!(
            readme.contains(&table),
            "README.md lacks this table:\n{table}"
        );
        let line = readme.replace('\n', " ");
        assert!(line.contains(VERSIONS), "README.md lacks {VERSIONS:?}");
    }
}
