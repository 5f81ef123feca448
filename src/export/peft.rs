//! An adapter directory as PEFT saves it, with tokenizer files and a model card.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use safetensors::Dtype;

use super::safetensors::{TensorInfo, f32_bytes, write_safetensors};
use super::write::{PartialDir, WriteError, atomic_bytes, is_taken};
use crate::adapter::peft::{
    AdapterConfig, AdapterWeights, BASE_KEY, CONFIG_FILE, LoraPair, WEIGHTS_FILE,
};
use crate::adapter::vera::{Lambdas, VeraWeights};
use crate::model::names::{
    EMBEDDING, LoraHalf, lambda_key, magnitude_key, peft_key, peft_module, projection_key,
    saved_key, token_rows_key,
};

/// Why an adapter could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteAdapterError {
    /// A file or directory.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The tokenizer files.
    #[error("cannot write the adapter's tokenizer: {0}")]
    Tokenizer(Box<dyn Error + Send + Sync>),
}

/// What the model card says beyond the configuration.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelCard {
    /// The resolved recipe.
    pub recipe_yaml: String,
    /// Name and value of each final metric.
    pub metrics: Vec<(String, String)>,
}

/// Writes an adapter directory: `adapter_config.json`, `adapter_model.safetensors` (contiguous
/// f32, PEFT's keys, sorted), whatever `save_tokenizer` writes, and `README.md`.
///
/// The directory appears whole; an adapter directory that is already there is replaced.
///
/// # Errors
/// What the system or `save_tokenizer` says; [`WriteError::Exists`] when a directory that holds
/// anything but an adapter is there.
pub fn write_adapter(
    dir: &Path,
    config: &AdapterConfig,
    adapter: &AdapterWeights,
    save_tokenizer: impl FnOnce(&Path) -> Result<(), Box<dyn Error + Send + Sync>>,
    card: &ModelCard,
) -> Result<(), WriteAdapterError> {
    if is_taken(dir) && !dir.join(CONFIG_FILE).is_file() {
        return Err(WriteError::Exists {
            path: dir.to_owned(),
        }
        .into());
    }
    let partial = PartialDir::create(dir)?;
    save_tokenizer(partial.path()).map_err(WriteAdapterError::Tokenizer)?;
    write_adapter_files(partial.path(), config, adapter)?;
    let card = card_text(config, adapter, card);
    atomic_bytes(&partial.path().join("README.md"), card.as_bytes())?;
    partial.publish_replacing()?;
    Ok(())
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, each atomically; for
/// run states, which need no card.
///
/// # Errors
/// What the system says.
pub fn write_adapter_files(
    dir: &Path,
    config: &AdapterConfig,
    adapter: &AdapterWeights,
) -> Result<(), WriteError> {
    let mut values = Vec::new();
    let mut add = |name: String, shape: &[usize], data| {
        let info = TensorInfo {
            name,
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        };
        values.push((info, f32_bytes(data)));
    };
    let transposed = (adapter.pairs.get(EMBEDDING)).map(LoraPair::transposed);
    for (path, pair) in &adapter.pairs {
        let pair = match (&transposed, path == EMBEDDING) {
            (Some(transposed), true) => transposed,
            _ => pair,
        };
        let module = peft_module(path, |path| adapter.pairs.contains_key(path));
        add(peft_key(&module, LoraHalf::A), &pair.a_shape, &pair.a);
        add(peft_key(&module, LoraHalf::B), &pair.b_shape, &pair.b);
        if let Some(magnitude) = &pair.magnitude {
            add(magnitude_key(&module), &[magnitude.len()], magnitude);
        }
    }
    for (module, rows) in &adapter.token_rows {
        add(token_rows_key(module), &rows.shape, &rows.values);
    }
    if let Some(VeraWeights { shared, lambdas }) = &adapter.vera {
        for (module, Lambdas { d, b }) in lambdas {
            add(lambda_key(module, LoraHalf::A), &[d.len()], d);
            add(lambda_key(module, LoraHalf::B), &[b.len()], b);
        }
        if let Some(LoraPair {
            a,
            a_shape,
            b,
            b_shape,
            ..
        }) = shared
        {
            add(projection_key(LoraHalf::A).to_owned(), a_shape, a);
            add(projection_key(LoraHalf::B).to_owned(), b_shape, b);
        }
    }
    for (name, saved) in &adapter.saved {
        let module = name.rsplit_once('.').map_or("", |(module, _)| module);
        let vera = adapter.vera.as_ref();
        let wrapped = adapter.pairs.contains_key(module)
            || vera.is_some_and(|vera| vera.lambdas.contains_key(module));
        add(saved_key(name, wrapped), &saved.shape, &saved.values);
    }
    values.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let tensors: Vec<_> = values
        .iter()
        .map(|(info, bytes)| (info.clone(), bytes.as_ref()))
        .collect();
    let mut metadata = vec![("format", "pt")];
    metadata.extend(adapter.base.as_deref().map(|base| (BASE_KEY, base)));
    write_safetensors(&dir.join(WEIGHTS_FILE), &metadata, &tensors)?;
    atomic_bytes(&dir.join(CONFIG_FILE), config.to_text().as_bytes())
}

/// The model card, Markdown behind YAML front matter.
fn card_text(config: &AdapterConfig, adapter: &AdapterWeights, card: &ModelCard) -> String {
    let base = config
        .base_model_name_or_path
        .as_deref()
        .unwrap_or("the base model");
    let parameters = adapter.parameters();
    let t = &config.targeting;
    let mut text = front_matter(base);
    let _ = write!(
        text,
        "# LoRA adapter for {base}\n\n\
         Trained with lorafit {version}: rank {rank}, alpha {alpha}, {modules} modules, \
         {parameters} trained parameters.\n\n",
        version = env!("CARGO_PKG_VERSION"),
        rank = t.rank,
        alpha = t.alpha,
        modules = adapter.modules(),
    );
    if !card.metrics.is_empty() {
        text.push_str("## Results\n\n| metric | value |\n| --- | --- |\n");
        for (name, value) in &card.metrics {
            let cell = |s: &str| s.replace('|', "\\|").replace('\n', " ");
            let _ = writeln!(text, "| {} | {} |", cell(name), cell(value));
        }
        text.push('\n');
    }
    let base_literal = serde_json::Value::from(base).to_string();
    let _ = write!(
        text,
        "## Use\n\nFrom this directory:\n\n\
         ```sh\nlorafit generate --base {shell} --adapter . --prompt \"…\"\n\
         lorafit merge --base {shell} --adapter . --out ../merged\n```\n\n\
         ```python\nfrom peft import PeftModel\n\
         from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         model = AutoModelForCausalLM.from_pretrained({base_literal})\n\
         model = PeftModel.from_pretrained(model, \".\")\n\
         tokenizer = AutoTokenizer.from_pretrained(\".\")\n```\n",
        shell = shell_quoted(base),
    );
    if !card.recipe_yaml.is_empty() {
        let fence = fence_for(&card.recipe_yaml);
        let recipe = card.recipe_yaml.trim_end();
        let _ = write!(text, "\n## Recipe\n\n{fence}yaml\n{recipe}\n{fence}\n");
    }
    text
}

/// What the Hugging Face hub reads. The base is named where it can be a hub id.
fn front_matter(base: &str) -> String {
    let id_part = |part: &str| {
        part.starts_with(char::is_alphanumeric)
            && part
                .chars()
                .all(|c| c.is_alphanumeric() || "-_.".contains(c))
    };
    let is_id = base
        .split_once('/')
        .is_some_and(|(owner, name)| id_part(owner) && id_part(name));
    let mut text = "---\n".to_owned();
    if is_id && !Path::new(base).exists() {
        let _ = writeln!(text, "base_model: {base}");
    }
    text.push_str(
        "library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- lorafit\n---\n\n",
    );
    text
}

/// A word of a POSIX shell.
fn shell_quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if word.chars().all(plain) && !word.is_empty() {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// A fence longer than any in the text.
fn fence_for(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    "`".repeat(longest.max(2) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hub_ids_are_named_in_the_front_matter() {
        assert!(front_matter("org/model-1.5").contains("base_model: org/model-1.5\n"));
        for path in ["/data/model", "model", "a/b/c", "../x", "./x"] {
            assert!(!front_matter(path).contains("base_model"), "{path}");
        }
    }

    #[test]
    fn quotes_and_fences_hold() {
        assert_eq!(shell_quoted("it's"), r"'it'\''s'");
        assert_eq!(fence_for("a: ```b```"), "````");
        assert_eq!(fence_for("a: b"), "```");
    }
}
