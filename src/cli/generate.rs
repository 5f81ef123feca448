//! `lorafit generate`: a model answers a prompt, as it writes.

use anyhow::Context;

use super::args::{GenerateArgs, Output};
use super::render::Renderer;
use super::schema::print;
use super::{Exit, Usage, interrupt};
use crate::adapter::inject::{self, Init};
use crate::adapter::peft;
use crate::data::tokenize::ChatTokenizer;
use crate::device;
use crate::infer::{self, Sampling};
use crate::model::weights::Weights;
use crate::model::{CausalLm, hub, names};

/// Generates and streams the answer.
///
/// # Errors
/// The base, the adapter or the prompt cannot be used.
pub fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<Exit> {
    let mut renderer = Renderer::new(*output);
    let device = device::open(args.device).map_err(|error| Usage(error.to_string()))?;
    let base = hub::locate(&args.base, &args.revision, &mut |p| renderer.download(&p))?;
    let weights = Weights::open(&base)?;
    let tokenizer = match &args.adapter {
        // An adapter's own tokenizer carries the chat template that it was trained with.
        Some(dir) if dir.join("tokenizer.json").is_file() => ChatTokenizer::open(dir, None)?,
        _ => ChatTokenizer::open(&base, None)?,
    };
    let prompt = infer::prompt_ids(&tokenizer, args.system.as_deref(), &args.prompt)?;
    let config = weights.config()?;
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= config.vocab_size) {
        anyhow::bail!(
            "token id {id} of the prompt is not in the model's vocabulary of {}; the tokenizer does not belong to this model",
            config.vocab_size
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
    let mut model =
        CausalLm::load(&weights, config, &device.device).context("cannot load the base model")?;
    if let Some(dir) = &args.adapter {
        let (config, pairs) = peft::read_adapter(dir)?;
        let modules = peft::fit(dir, &config, &pairs, &names::linear_shapes(model.config()))?;
        inject::inject(&mut model, &modules, 0.0, &Init::Loaded(&pairs));
    }
    interrupt::listen()?;
    stream(&model.frozen(), &tokenizer, &prompt, args, output)
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
    let (mut ids, mut shown, mut fault) = (Vec::new(), 0, None);
    let answer = infer::generate(
        model,
        prompt,
        tokenizer.stop_ids(),
        sampling,
        &mut |token| {
            ids.push(token);
            if !output.json {
                match show_new(tokenizer, &ids, shown) {
                    Ok(now) => shown = now,
                    Err(error) => fault = Some(error),
                }
            }
            fault.is_none() && !interrupt::asked()
        },
    );
    if let Some(error) = fault {
        return Err(error);
    }
    let text = tokenizer.decode(&answer, true)?;
    if output.json {
        let line = serde_json::json!({
            "event": "generate", "prompt": args.prompt, "text": text, "tokens": answer.len(),
        });
        print(&format!("{line}\n"))?;
    } else {
        print(&format!("{}\n", text.get(shown..).unwrap_or_default()))?;
    }
    Ok(if interrupt::asked() {
        Exit::Interrupted
    } else {
        Exit::Done
    })
}

/// Prints what is new in the text of `ids`, but no character that is not complete yet.
fn show_new(tokenizer: &ChatTokenizer, ids: &[u32], shown: usize) -> anyhow::Result<usize> {
    let text = tokenizer.decode(ids, true)?;
    // The decoder puts U+FFFD where a character's last bytes are still to come.
    if text.ends_with('\u{FFFD}') {
        return Ok(shown);
    }
    match text.get(shown..) {
        Some(new) => {
            print(new)?;
            Ok(text.len())
        }
        None => Ok(shown),
    }
}
