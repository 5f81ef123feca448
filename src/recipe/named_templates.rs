//! Chat templates with a name, for `data.chat_template: NAME`.
//!
//! Each is a Jinja file in `recipes/chat_templates` that renders what the models' official template
//! renders (its README lists the differences) and marks with `{% generation %}` what the
//! assistant writes, its end of turn included: one block for each assistant message.

use crate::recipe::suggest;

/// What an assistant turn ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndOfTurn {
    /// The tokenizer's `eos_token`.
    Eos,
    /// A token that the template spells out.
    Token(&'static str),
}

impl EndOfTurn {
    /// The text of the token, given the tokenizer's `eos_token`.
    pub fn text(self, eos_token: &str) -> &str {
        match self {
            Self::Eos => eos_token,
            Self::Token(token) => token,
        }
    }
}

/// A chat template that users can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedTemplate {
    /// What is written in a recipe.
    pub name: &'static str,
    /// Models that use it, in one line.
    pub about: &'static str,
    /// What an assistant turn ends with.
    pub end_of_turn: EndOfTurn,
    /// The Jinja source.
    pub source: &'static str,
}

/// An entry of [`NAMED`], whose file has the template's name.
macro_rules! named {
    ($name:literal, $about:literal, $end_of_turn:expr) => {
        NamedTemplate {
            name: $name,
            about: $about,
            end_of_turn: $end_of_turn,
            source: include_str!(concat!("../../recipes/chat_templates/", $name, ".jinja")),
        }
    };
}

const IM_END: EndOfTurn = EndOfTurn::Token("<|im_end|>");
const EOT_ID: EndOfTurn = EndOfTurn::Token("<|eot_id|>");
const DEEPSEEK_END: EndOfTurn = EndOfTurn::Token("<｜end▁of▁sentence｜>");

/// All named templates, by name.
#[rustfmt::skip]
pub const NAMED: &[NamedTemplate] = &[
    named!("alpaca", "Stanford Alpaca's prompt; suits base models", EndOfTurn::Eos),
    named!("chatml", "OpenHermes, Dolphin, Yi and other ChatML models", IM_END),
    named!("deepseek", "DeepSeek V3", DEEPSEEK_END),
    named!("deepseek-r1", "DeepSeek R1 and its distillations", DEEPSEEK_END),
    named!("gemma", "Gemma 1, 2 and 3 (text)", EndOfTurn::Token("<end_of_turn>")),
    named!("llama2", "Llama 2 Chat", EndOfTurn::Eos),
    named!("llama3", "Llama 3 Instruct (3.0)", EOT_ID),
    named!("llama3.1", "Llama 3.1, 3.2 and 3.3 Instruct", EOT_ID),
    named!("mistral", "Mistral 7B Instruct v0.1 and v0.2, Mixtral 8x7B", EndOfTurn::Eos),
    named!("mistral-v3", "Mistral 7B Instruct v0.3, Mixtral 8x22B, Mistral Large 2407", EndOfTurn::Eos),
    named!("mistral-v7", "Mistral Large 2411", EndOfTurn::Eos),
    named!("olmo2", "OLMo 2 Instruct", EndOfTurn::Eos),
    named!("phi3", "Phi-3 and Phi-3.5 mini", EndOfTurn::Token("<|end|>")),
    named!("phi4", "Phi-4", IM_END),
    named!("qwen", "Qwen2 and Qwen2.5 Instruct", IM_END),
    named!("qwen3", "Qwen3 (thinking and not)", IM_END),
    named!("qwen3-instruct", "Qwen3 Instruct 2507", IM_END),
    named!("smollm2", "SmolLM2 Instruct", IM_END),
    named!("tulu3", "Tulu 3", EndOfTurn::Eos),
    named!("vicuna", "Vicuna v1.1 to v1.5", EndOfTurn::Eos),
    named!("zephyr", "Zephyr 7B, TinyLlama Chat", EndOfTurn::Eos),
];

/// The template of that name.
pub fn find(name: &str) -> Option<&'static NamedTemplate> {
    NAMED.iter().find(|template| template.name == name)
}

/// All names, in order.
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMED.iter().map(|template| template.name)
}

/// The name that was meant by a mistyped one, if one is near enough.
pub fn nearest(name: &str) -> Option<&'static str> {
    suggest::nearest(name, names())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_mistyped_ones_corrected() {
        assert_eq!(find("qwen3").map(|template| template.name), Some("qwen3"));
        assert_eq!(find("Qwen3"), None);
        assert!(names().is_sorted());
        for (mistyped, meant) in [
            ("Qwen3", Some("qwen3")),
            ("llama-3.1", Some("llama3.1")),
            ("gemma3", Some("gemma")),
            ("chat_ml", Some("chatml")),
            ("templates/mine.jinja", None),
        ] {
            assert_eq!(nearest(mistyped), meant, "{mistyped}");
        }
    }

    #[test]
    fn the_end_of_a_turn_is_spelled_out_or_the_tokenizers() {
        assert_eq!(EndOfTurn::Eos.text("</s>"), "</s>");
        assert_eq!(IM_END.text("</s>"), "<|im_end|>");
    }
}
