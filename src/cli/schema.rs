//! `lorafit schema`: the JSON Schema of recipes, or their reference page.

use std::io::{ErrorKind, Write};

use anyhow::Context;

use super::args::SchemaArgs;
use crate::recipe::schema;

/// Prints the schema.
///
/// # Errors
/// Where standard output cannot be written.
pub fn run(args: &SchemaArgs) -> anyhow::Result<()> {
    if args.markdown {
        print(&schema::reference_markdown())
    } else {
        print(&format!("{:#}\n", schema::json_schema()))
    }
}

/// Prints text; a reader that stopped listening, such as `head`, is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
