//! Dataset rows in one form: a conversation, a prompt with its response, plain text, token ids, or
//! a pair of answers of which one is preferred.
//!
//! [`detect`] tells the format of a row, [`row`] reads it, with names mapped by [`Fields`]. Each
//! format has a file: `messages` (with `tools`, and with what a row says beside them in `frame`),
//! `alpaca`, `completion`, `preference` and `pretokenised`.

mod alpaca;
mod completion;
mod fields;
mod frame;
mod messages;
mod preference;
mod pretokenised;
mod row_format;
mod tools;

use serde_json::{Map, Value};

pub use self::fields::Fields;
pub use self::row_format::{RowOptions, detect, row};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The whole message as the chat template sees it, `role` and `content` among the rest, in the
    /// order of the dataset. What only says whether it trains is left out.
    pub fields: Map<String, Value>,
    /// Whether its tokens train; only ever true for the assistant's.
    pub trains: bool,
}

impl Message {
    /// A message with role and content only; it trains where it is the assistant's.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Value::from(role.as_str()));
        fields.insert("content".to_owned(), Value::from(content.into()));
        Self {
            trains: role == "assistant",
            role,
            fields,
        }
    }

    /// The message as a chat template sees it.
    pub fn to_json(&self) -> Map<String, Value> {
        self.fields.clone()
    }

    /// Whether a chat template sees the same in both.
    pub(super) fn reads_as(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

/// Messages, and what else the chat template is given with them.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// At least one.
    pub messages: Vec<Message>,
    /// Tool definitions, an array.
    pub tools: Option<Value>,
    /// Further variables of the template: the row's `chat_template_kwargs`.
    pub variables: Map<String, Value>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Self {
            messages,
            tools: None,
            variables: Map::new(),
        }
    }
}

/// A row that can be tokenised.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// Rendered with the chat template; the assistant's turns train.
    Chat(Conversation),
    /// The response trains.
    Completion {
        /// Text that is given.
        prompt: String,
        /// Text that is learned.
        response: String,
    },
    /// All of it trains.
    Text(String),
    /// Tokenised by the dataset's author.
    Tokens {
        /// `[T]`, each below 2³¹.
        input_ids: Vec<u32>,
        /// `[T]`; the id where it trains, [`IGNORE_INDEX`](super::IGNORE_INDEX) where not. Without
        /// labels all of it trains.
        labels: Option<Vec<i32>>,
    },
    /// Two answers to one prompt, each a [`Row::Chat`] or each a [`Row::Completion`].
    Preference {
        /// With the better answer.
        chosen: Box<Row>,
        /// With the worse one.
        rejected: Box<Row>,
    },
}
