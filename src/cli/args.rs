//! What can be typed: commands, options, and how their values are read.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use serde::de::DeserializeOwned;

use super::merge_args::{CombineArgs, MergeArgs};
use crate::device::DeviceSpec;
use crate::recipe::{Quantization, load, schema};

/// Fine-tunes open-weight language models with LoRA on one GPU or a CPU.
#[derive(Debug, Parser)]
#[command(
    name = "lorafit",
    version,
    propagate_version = true,
    after_help = "Example:\n  lorafit init\n  lorafit train recipe.yaml\n\n\
        Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 130 interrupted."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What to print.
    #[command(flatten)]
    pub output: Output,
}

/// What to print.
#[derive(Debug, Clone, Copy, Args)]
pub struct Output {
    /// Print one JSON object a line for each event, for scripts
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results and errors only
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train what a recipe describes
    Train(TrainArgs),
    /// Merge an adapter into its base model, and verify the result
    Merge(MergeArgs),
    /// Add adapters up to one
    Combine(CombineArgs),
    /// Check a recipe, its data and its model without training
    Check(CheckArgs),
    /// Plan how much memory a recipe needs, and what would make it fit
    Plan(PlanArgs),
    /// Look at a recipe's dataset: its tokens, what trains, how long rows are
    #[command(subcommand)]
    Data(DataCommand),
    /// Let a model answer a prompt, with or without an adapter
    Generate(GenerateArgs),
    /// Write a commented recipe to start from
    Init(InitArgs),
    /// Print the JSON Schema of recipes
    Schema(SchemaArgs),
    /// List the devices that this build can use on this machine
    #[command(after_help = "Example:\n  lorafit devices")]
    Devices,
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
}

/// Not a doc comment: the brackets would read as links.
const DEVICE_HELP: &str =
    "Where to compute: auto, cpu, vulkan[:i], metal[:i], webgpu[:i] or cuda[:i]";

/// A recipe and what overrides it.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// The recipe, a YAML file
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Override a knob of the recipe; the value is YAML. May be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Where to compute.
    #[arg(long, default_value = "auto", help = DEVICE_HELP)]
    pub device: DeviceSpec,
}

/// `lorafit train`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  lorafit train recipe.yaml --set train.max_steps=100 --out runs/short"
)]
pub struct TrainArgs {
    /// What to train.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Continue the run in the run directory exactly where it stopped
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,
    /// The run directory; short for --set output_dir=DIR
    #[arg(long, value_name = "DIR")]
    pub out: Option<String>,
    /// Replace the run that is in the run directory
    #[arg(long)]
    pub overwrite: bool,
    /// Say what would be done, and stop before training
    #[arg(long)]
    pub dry_run: bool,
    /// What there is of memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Train even what the memory plan says will not fit
    #[arg(long)]
    pub force: bool,
}

/// What a plan of memory is held against.
#[derive(Debug, Clone, Copy, Args)]
pub struct MemoryArgs {
    /// How much memory there is, such as 8GiB, instead of what the device says
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub vram: Option<u64>,
}

impl TrainArgs {
    /// Every override of the recipe: `--set` in order, then `--out`.
    pub fn sets(&self) -> Vec<String> {
        let out = self.out.as_ref();
        // As JSON text, which YAML reads as it is, whatever is in it.
        let out = out.map(|dir| format!("output_dir={}", serde_json::Value::from(dir.as_str())));
        self.recipe.set.iter().cloned().chain(out).collect()
    }
}

/// `lorafit check`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  lorafit check recipe.yaml --set adapter.rank=32")]
pub struct CheckArgs {
    /// What to check.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// What there is of memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// `lorafit plan`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  lorafit plan recipe.yaml --vram 8GiB\n  lorafit plan recipe.yaml --vram 8GiB --auto -o fits.yaml"
)]
pub struct PlanArgs {
    /// What to plan.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// What there is of memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Write a recipe that fits: the same with a few knobs changed, those first that lose least
    #[arg(long, requires = "out")]
    pub auto: bool,
    /// The recipe to write, with --auto
    #[arg(short, long, value_name = "FILE", requires = "auto")]
    pub out: Option<PathBuf>,
}

/// `lorafit data`
#[derive(Debug, Clone, Subcommand)]
#[command(after_help = "Example:\n  lorafit data preview recipe.yaml --rows 3")]
pub enum DataCommand {
    /// Show the tokens of rows, and which of them train
    Preview(PreviewArgs),
    /// Count rows and tokens, and draw how long rows are
    Stats(StatsArgs),
}

/// A recipe whose data are looked at.
#[derive(Debug, Clone, Args)]
pub struct DataRecipe {
    /// The recipe, a YAML file
    #[arg(value_name = "RECIPE")]
    pub recipe: PathBuf,
    /// Override a knob of the recipe; the value is YAML. May be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `lorafit data preview`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  lorafit data preview recipe.yaml --rows 20 --html preview.html"
)]
pub struct PreviewArgs {
    /// What to look at.
    #[command(flatten)]
    pub recipe: DataRecipe,
    /// How many rows, from the first on
    #[arg(
        long,
        value_name = "N",
        default_value_t = 5,
        value_parser = parse_count,
        conflicts_with = "row"
    )]
    pub rows: usize,
    /// Only the row with this number, counted from 1 over all files
    #[arg(long, value_name = "I", value_parser = parse_count)]
    pub row: Option<usize>,
    /// Rows as they are packed for the first epoch, instead of rows of the dataset
    #[arg(long)]
    pub packed: bool,
    /// One token a line, with index, position, segment, id and role
    #[arg(long, conflicts_with = "html")]
    pub tokens: bool,
    /// Write a page for a browser, to share
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// `lorafit data stats`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  lorafit data stats recipe.yaml --set data.packing=true")]
pub struct StatsArgs {
    /// What to count.
    #[command(flatten)]
    pub recipe: DataRecipe,
}

/// `lorafit generate`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  lorafit generate --base HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/recipe/adapter \
        --prompt \"Define: absurdity\""
)]
pub struct GenerateArgs {
    /// The base model: directory, .gguf file or Hugging Face id
    #[arg(long, value_name = "MODEL")]
    pub base: String,
    /// Branch, tag or commit of a Hugging Face id
    #[arg(long, default_value = default_of("base.revision"))]
    pub revision: String,
    /// An adapter, in PEFT's layout
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    #[arg(
        long,
        value_name = "HOW",
        help = effect_of("base.quantization"),
        default_value = default_of("base.quantization"),
        value_parser = value_of::<Quantization>("base.quantization")
    )]
    /// How the base is quantised.
    pub quantization: Quantization,
    /// What the user says
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// The system message, where the chat template has one
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[arg(
        long,
        value_name = "N",
        help = effect_of("sample.max_new_tokens"),
        default_value = default_of("sample.max_new_tokens"),
        value_parser = value_of::<usize>("sample.max_new_tokens")
    )]
    /// Longest answer in tokens.
    pub max_new_tokens: usize,
    #[arg(
        long,
        value_name = "X",
        help = effect_of("sample.temperature"),
        default_value = default_of("sample.temperature"),
        value_parser = value_of::<f64>("sample.temperature")
    )]
    /// Randomness of the answer.
    pub temperature: f64,
    #[arg(
        long,
        value_name = "X",
        help = effect_of("sample.top_p"),
        default_value = default_of("sample.top_p"),
        value_parser = value_of::<f64>("sample.top_p")
    )]
    /// Total probability of the tokens drawn from.
    pub top_p: f64,
    /// Seed of the draw
    #[arg(
        long,
        value_name = "N",
        default_value = default_of("train.seed"),
        value_parser = value_of::<u64>("train.seed")
    )]
    pub seed: u64,
    /// Where to compute.
    #[arg(long, default_value = "auto", help = DEVICE_HELP)]
    pub device: DeviceSpec,
}

/// `lorafit init`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  lorafit init --template full my-recipe.yaml")]
pub struct InitArgs {
    /// What kind of recipe
    #[arg(
        long,
        value_name = "NAME",
        default_value = schema::template_names()[0],
        value_parser = PossibleValuesParser::new(schema::template_names())
    )]
    pub template: String,
    /// The file to write, or - to print
    #[arg(value_name = "FILE", default_value = "recipe.yaml")]
    pub file: PathBuf,
}

/// `lorafit schema`
#[derive(Debug, Clone, Copy, Args)]
#[command(after_help = "Example:\n  lorafit schema > recipe.schema.json")]
pub struct SchemaArgs {
    /// Print the reference page of all knobs instead
    #[arg(long)]
    pub markdown: bool,
}

/// `lorafit completions`
#[derive(Debug, Clone, Copy, Args)]
#[command(
    after_help = "Example:\n  lorafit completions bash > ~/.local/share/bash-completion/completions/lorafit"
)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// The default of a recipe's knob, for an option that shares it.
pub(super) fn default_of(key: &str) -> &'static str {
    schema::find(key)
        .and_then(schema::Knob::default_text)
        .unwrap_or_default()
}

/// The effect of a recipe's knob, for an option that shares it.
fn effect_of(key: &str) -> String {
    let effect = schema::find(key).map_or(String::new(), schema::Knob::describe);
    effect.trim_end_matches('.').to_owned()
}

/// Reads the value of an option that shares a recipe's knob, and its range.
pub(super) fn value_of<T: DeserializeOwned>(
    key: &'static str,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static {
    move |text| {
        let value = load::value(key, text)?;
        serde_json::from_value(value).map_err(|error| error.to_string())
    }
}

/// Reads a number from 1 up.
fn parse_count(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("expected a whole number from 1 up".to_owned()),
    }
}

/// Units of a size in bytes.
const UNITS: &[(&str, u64)] = &[
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("b", 1),
    ("", 1),
];

/// Reads `5GB`, `500 MB`, `1.5GiB` or plain bytes.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim().to_lowercase();
    let expected = || "expected bytes or a size such as 500MB, 5GB or 1GiB".to_owned();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[number.len()..];
    let (_, scale) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or_else(expected)?;
    let number: f64 = number.trim().parse().map_err(|_| expected())?;
    let bytes = number * *scale as f64;
    // Above 2^53 a float is no longer exact to the byte, and no disk is that large.
    if !(1.0..=9e15).contains(&bytes) {
        return Err(expected());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        Cli::try_parse_from(line.split(' '))
            .map(|cli| cli.command)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_command_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands_mut() {
            let help = command.render_help().to_string();
            assert!(
                help.contains("Example:\n  lorafit ") || command.get_name() == "help",
                "{help}"
            );
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("5GB", 5_000_000_000),
            ("500mb", 500_000_000),
            ("1GiB", 1 << 30),
            ("1.5 kib", 1536),
            ("77", 77),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1GB", "0", "5XB", "nan", "inf", "1e300TB", "5é"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_merge_names_a_run_or_a_base_with_an_adapter() {
        assert!(parse("lorafit merge runs/a").is_ok());
        assert!(parse("lorafit merge --base b --adapter a --out o --dtype bf16").is_ok());
        for line in [
            "lorafit merge",
            "lorafit merge --base b --out o",
            "lorafit merge --adapter a --out o",
            "lorafit merge --base b --adapter a",
            "lorafit merge runs/a --base b --adapter a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn options_share_the_range_and_default_of_their_knobs() {
        let Ok(Command::Generate(args)) =
            parse("lorafit generate --base b --prompt p --temperature 0.5 --device cuda:1")
        else {
            panic!("does not parse");
        };
        assert_eq!((args.max_new_tokens, args.temperature), (48, 0.5));
        assert_eq!((args.top_p, args.seed), (1.0, 42));
        let error = parse("lorafit generate --base b --prompt p --top-p 2").unwrap_err();
        assert!(
            error.contains("found `2`, expected a number above 0, at most 1"),
            "{error}"
        );
        assert!(parse("lorafit generate --base b --prompt p --device gpu").is_err());
    }

    #[test]
    fn out_is_a_set() {
        let Ok(Command::Train(args)) =
            parse("lorafit train r.yaml --set train.seed=1 --out a:#b\"c")
        else {
            panic!("does not parse");
        };
        assert_eq!(args.sets(), ["train.seed=1", "output_dir=\"a:#b\\\"c\""]);
        assert!(parse("lorafit train r.yaml --resume --overwrite").is_err());
    }
}
