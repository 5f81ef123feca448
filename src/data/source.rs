//! Finds the files of a source: a file, a directory, a pattern, or a dataset of the hub.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::conversation::Fields;
use super::faults::DataError;
use super::pipeline::Source;
use super::reader::is_data_file;
use crate::hub::{self, DatasetId};
use crate::recipe::plan::{DataFormat, SourcePlan};
use crate::recipe::source::{HUB, is_pattern};

/// How deep directories are searched.
const MAX_DEPTH: usize = 16;

/// Finds the files of each source; those of the hub are downloaded.
///
/// # Errors
/// A source that leads to no file, or cannot be downloaded.
pub fn find(
    sources: &[SourcePlan],
    format: DataFormat,
    progress: &mut dyn FnMut(hub::Progress),
) -> Result<Vec<Source>, DataError> {
    let find = |plan: &SourcePlan| {
        let pairs: Vec<_> = plan.fields.clone().into_iter().collect();
        let files: Vec<Arc<Path>> = files(plan, progress)?.into_iter().map(Into::into).collect();
        if files.is_empty() {
            return Err(DataError::NoFiles {
                path: plan.path.clone(),
            });
        }
        Ok(Source {
            format: plan.format.unwrap_or(format),
            fields: Fields::new(&pairs)?,
            files,
            plan: plan.clone(),
        })
    };
    sources.iter().map(find).collect()
}

fn files(
    plan: &SourcePlan,
    progress: &mut dyn FnMut(hub::Progress),
) -> Result<Vec<PathBuf>, DataError> {
    let path = Path::new(&plan.path);
    if plan.path.starts_with(HUB) {
        let (config, split) = (plan.config.as_deref(), plan.split.as_deref());
        let id = DatasetId::parse(&plan.path, config, split, plan.revision.as_deref())?;
        let options = hub::HubOptions::from_env();
        return Ok(hub::locate_dataset(&id, &options, progress)?);
    }
    if path.is_dir() {
        let mut found = Vec::new();
        collect(path, 0, &mut found).map_err(|source| DataError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        found.sort();
        return Ok(found);
    }
    if !path.exists() && is_pattern(&plan.path) {
        let found = glob::glob(&plan.path).map_err(|_| DataError::NoFiles {
            path: plan.path.clone(),
        })?;
        // Sorted by name, as glob gives them; directories that match are no data.
        return Ok(found.flatten().filter(|path| path.is_file()).collect());
    }
    Ok(vec![path.to_owned()])
}

/// Data files below a directory; hidden ones are left out.
fn collect(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            // Links may lead in circles.
            if depth < MAX_DEPTH && !entry.file_type()?.is_symlink() {
                collect(&path, depth + 1, found)?;
            }
        } else if is_data_file(&name) {
            found.push(path);
        }
    }
    Ok(())
}
