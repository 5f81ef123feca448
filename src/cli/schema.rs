//! `lorafit schema`: the JSON Schema of recipes, or their reference page.

use super::args::SchemaArgs;
use super::print::print;
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
