//! `lorafit init`: a commented recipe to start from.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, bail};

use super::args::{InitArgs, Output};
use super::print::{print, say};
use crate::recipe::schema;

/// Writes the template to a file that does not exist yet, or prints it.
///
/// # Errors
/// Where the file exists or cannot be written.
pub fn run(args: &InitArgs, output: &Output) -> anyhow::Result<()> {
    let Some(recipe) = schema::commented_template(&args.template) else {
        bail!(
            "there is no template `{}`; there are {}",
            args.template,
            schema::template_names().join(", ")
        );
    };
    if args.file == Path::new("-") {
        return print(&recipe);
    }
    write_new(&args.file, &recipe, "lorafit init my-recipe.yaml")?;
    if output.json {
        let event = serde_json::json!({"event": "init", "path": args.file});
        print(&format!("{event}\n"))?;
    } else if !output.quiet {
        let file = args.file.display();
        say(&format!(
            "wrote {file}\nedit it, then try: lorafit check {file}"
        ));
    }
    Ok(())
}

/// Creates a file, never replacing one; leaves none behind when it cannot be written in full. `example`
/// names another.
pub(super) fn write_new(path: &Path, text: &str, example: &str) -> anyhow::Result<()> {
    let mut file = match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
            "{} exists already and is left as it is; remove it, or name another file: {example}",
            path.display()
        ),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot create {}", path.display()));
        }
    };
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all());
    if let Err(error) = written {
        // It was created a moment ago and holds nothing of anyone's.
        let _ = fs::remove_file(path);
        return Err(error).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_once_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let args = InitArgs {
            template: "lora".into(),
            file: folder.path().join("recipe.yaml"),
        };
        let quiet = Output {
            json: false,
            quiet: true,
        };
        run(&args, &quiet).unwrap();
        assert_eq!(
            Some(fs::read_to_string(&args.file).unwrap()),
            schema::commented_template("lora")
        );
        fs::write(&args.file, "mine").unwrap();
        let error = run(&args, &quiet).unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
        assert_eq!(fs::read_to_string(&args.file).unwrap(), "mine");
    }
}
