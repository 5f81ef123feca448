//! What `lorafit check` says about servers: who loads the adapter, who does not, and why.

use serde_json::json;

use super::render::Renderer;
use crate::export::servers::{Adapter, Effect, Finding, SERVERS, findings};
use crate::model::names;
use crate::recipe::plan::TrainedBias;
use crate::train::prepare::{AdapterChoice, Prepared};

/// Shows which servers load the adapter of a run; nothing where all weights train.
pub fn show(prepared: &Prepared, renderer: &mut Renderer) {
    let Some(choice) = &prepared.adapter else {
        return;
    };
    let modules = choice.modules.iter().map(|chosen| chosen.module.as_str());
    let findings = findings(&Adapter {
        config: choice.config.as_written().to_json(),
        modules: modules.collect(),
        has_biases: has_biases(prepared, choice),
        model_type: prepared.config.family.model_type,
        tied_head: prepared.config.tie_word_embeddings,
    });
    let loads = loading(&findings).concat();
    let event = json!({"event": "servers", "loads": loads, "findings": findings});
    let names = ["servers"].into_iter().chain(std::iter::repeat(""));
    let lines: Vec<_> = names.zip(lines(&findings)).collect();
    renderer.facts(&event, &lines);
}

/// Whether the base has biases that train.
fn has_biases(prepared: &Prepared, choice: &AdapterChoice) -> bool {
    let tensors = names::tensors(&prepared.config);
    let mut biases = tensors
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".bias"));
    match choice.config.bias {
        TrainedBias::None => false,
        TrainedBias::All => biases.next().is_some(),
        TrainedBias::LoraOnly => {
            biases.any(|module| choice.modules.iter().any(|chosen| chosen.module == module))
        }
    }
}

/// The servers that load the adapter directory as it is.
fn loading(findings: &[Finding]) -> Vec<&'static [&'static str]> {
    let is_found = |servers: &&[&str]| findings.iter().any(|found| found.servers == *servers);
    SERVERS
        .into_iter()
        .filter(|servers| !is_found(servers))
        .collect()
}

/// A line for the servers that load the adapter, and one for each reason not to.
fn lines(findings: &[Finding]) -> Vec<String> {
    let loads = loading(findings).into_iter();
    let loads = loads.map(|servers| format!("{} the adapter as it is", said(servers, "load")));
    loads.chain(findings.iter().map(line)).collect()
}

fn line(finding: &Finding) -> String {
    let (servers, choice) = (finding.servers, finding.choice);
    let what = match (finding.effect, finding.how) {
        (_, Some(how)) => format!("{} it {how}", said(servers, "load")),
        (Effect::Misreads, _) => format!("{} something else ({choice})", said(servers, "compute")),
        _ => format!("{} it ({choice})", said(servers, "refuse")),
    };
    format!("{what}: {}; {}", finding.why, finding.remedy)
}

/// Who does what.
fn said(servers: &[&str], verb: &str) -> String {
    let ending = if servers.len() == 1 { "s" } else { "" };
    format!("{} {verb}{ending}", servers.join(" and "))
}
