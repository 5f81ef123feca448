//! Placeholder of data/conversation.
