//! `lorafit generate`: a model answers a prompt, as it writes.

use std::time::Instant;

use anyhow::Context;

use super::args::{GenerateArgs, Output};
use super::print::{print, print_while_read};
use super::render::Renderer;
use super::warnings::Warning;
use super::{Exit, Usage, interrupt};
use crate::adapter::inject::{self, Init};
use crate::adapter::peft;
use crate::adapter::tokens::TrainedTokens;
use crate::data::tokenize::ChatTokenizer;
use crate::device;
use crate::hub;
use crate::infer::{self, Sampling};
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::model::{CausalLm, Keep};
use crate::recipe::Quantization;

/// Generates and streams the answer.
///
/// # Errors
/// The base, the adapter or the prompt cannot be used.
pub fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<Exit> {
    let mut renderer = Renderer::new(*output);
    let device = device::open(args.device).map_err(|error| Usage(error.to_string()))?;
    let base = hub::locate(&args.base, &args.revision, &mut |p| renderer.download(&p))?;
    renderer.finish_bar();
    let weights = Weights::open(&base)?;
    let config = weights.config()?;
    let tokenizer = match &args.adapter {
        // An adapter's own tokenizer carries the chat template that it was trained with.
        Some(dir) if dir.join("tokenizer.json").is_file() => ChatTokenizer::open(dir, None)?,
        _ => ChatTokenizer::open(&base, None)?,
    };
    let prompt = infer::prompt_ids(&tokenizer, args.system.as_deref(), &args.prompt)?;
    let adapter = match &args.adapter {
        Some(dir) => {
            let (adapter, weights) = peft::read_adapter(dir)?;
            let modules = peft::fit_model(dir, &adapter, &weights, &config)?;
            Some((adapter, modules, weights))
        }
        None => None,
    };
    let tokens = adapter
        .as_ref()
        .and_then(|(adapter, ..)| adapter.trained_tokens.as_ref());
    let vocabulary = tokens
        .map_or(0, TrainedTokens::vocabulary)
        .max(config.vocab_size);
    check_prompt(&prompt, &config, vocabulary)?;
    warn(&tokenizer, args, &mut renderer);
    let keep = Keep {
        linears: args.quantization.scheme(),
        gguf_blocks: args.quantization == Quantization::Gguf,
        ..Keep::default()
    };
    let mut model = CausalLm::load_as(&weights, config, &device.device, keep)
        .context("cannot load the base model")?;
    if let Some((config, modules, weights)) = &adapter {
        inject::inject(&mut model, config, modules, &Init::Loaded(weights));
    }
    interrupt::listen(output, "stopping")?;
    stream(&model.frozen(), &tokenizer, &prompt, args, output)
}

/// Refuses a prompt that the model has no embeddings or no positions for.
fn check_prompt(prompt: &[u32], config: &ModelConfig, vocabulary: usize) -> anyhow::Result<()> {
    if prompt.is_empty() {
        return Err(Usage("--prompt is empty, so there is nothing to go on from".into()).into());
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocabulary) {
        anyhow::bail!(
            "token id {id} of the prompt is not in the model's vocabulary of {vocabulary}; the tokenizer does not belong to this model"
        );
    }
    if prompt.len() >= config.max_position_embeddings {
        return Err(Usage(format!(
            "the prompt has {} tokens, and the model has positions for {}; shorten it",
            prompt.len(),
            config.max_position_embeddings
        ))
        .into());
    }
    Ok(())
}

fn warn(tokenizer: &ChatTokenizer, args: &GenerateArgs, renderer: &mut Renderer) {
    if !tokenizer.has_template() {
        let remedy = "put a chat_template.jinja beside its tokenizer.json, or write --prompt as a text to go on from";
        renderer.warn(&Warning::PlainPrompts { remedy });
    }
    if tokenizer.stop_ids().is_empty() {
        let max_new_tokens = args.max_new_tokens;
        renderer.warn(&Warning::NoStopToken { max_new_tokens });
    }
}

/// Writes the answer piece by piece; with `--json`, one object at the end.
fn stream(
    model: &CausalLm,
    tokenizer: &ChatTokenizer,
    prompt: &[u32],
    args: &GenerateArgs,
    output: &Output,
) -> anyhow::Result<Exit> {
    let sampling = Sampling {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut shown = Shown {
        tokenizer,
        ids: Vec::new(),
        length: 0,
        fault: None,
    };
    let begin = Instant::now();
    let mut on_token = |token| (output.json || shown.add(token)) && !interrupt::asked();
    let stop = tokenizer.stop_ids();
    let answer = infer::generate(model, prompt, stop, sampling, &mut on_token);
    if let Some(error) = shown.fault {
        return Err(error);
    }
    let text = tokenizer.decode(&answer, true)?;
    if output.json {
        let room = model.config().max_position_embeddings - prompt.len();
        let end = match (
            interrupt::asked(),
            answer.len() < args.max_new_tokens.min(room),
        ) {
            (true, _) => "interrupted",
            (_, true) => "stop_token",
            (_, false) => "length",
        };
        let line = serde_json::json!({
            "event": "generate",
            "prompt": args.prompt,
            "text": text,
            "prompt_tokens": prompt.len(),
            "tokens": answer.len(),
            "end": end,
            "seconds": begin.elapsed().as_secs_f64(),
        });
        print(&format!("{line}\n"))?;
    } else {
        let rest = text.get(shown.length..).unwrap_or_default();
        print(&format!("{rest}\n"))?;
    }
    Ok(match interrupt::asked() {
        true => Exit::Interrupted,
        false => Exit::Done,
    })
}

/// What of an answer is printed.
struct Shown<'a> {
    tokenizer: &'a ChatTokenizer,
    ids: Vec<u32>,
    /// Bytes of the text that are printed.
    length: usize,
    fault: Option<anyhow::Error>,
}

impl Shown<'_> {
    /// Prints what a token adds; `false` where it cannot, or nobody reads any more.
    fn add(&mut self, token: u32) -> bool {
        self.ids.push(token);
        self.print_new().unwrap_or_else(|error| {
            self.fault = Some(error);
            false
        })
    }

    /// Prints what is new in the text, but no character that is not complete yet.
    fn print_new(&mut self) -> anyhow::Result<bool> {
        let text = self.tokenizer.decode(&self.ids, true)?;
        // The decoder puts U+FFFD where a character's last bytes are still to come.
        if text.ends_with('\u{FFFD}') {
            return Ok(true);
        }
        let Some(new) = text.get(self.length..) else {
            return Ok(true);
        };
        self.length = text.len();
        print_while_read(new)
    }
}
