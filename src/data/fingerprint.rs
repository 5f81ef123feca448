//! What identifies a dataset as it is trained on.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::SystemTime;

use blake3::Hasher;
use serde_json::json;

use super::faults::DataError;
use super::pipeline::Source;
use super::tokenize::ChatTokenizer;
use crate::recipe::plan::{DataPlan, Packing};

/// Changes with everything that changes what samples are made of the same input.
const PIPELINE_VERSION: u32 = 1;

/// Bytes of each end of a file that a quick look sees.
const ENDS: u64 = 1 << 20;

/// Bytes that are hashed at once: enough for several cores. Files are not mapped, so that memory
/// does not seem to grow with them.
const BUFFER: usize = 4 << 20;

/// How closely the data are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// At every byte.
    Whole,
    /// At length and both ends: for data that are streamed because they are large.
    Ends,
}

/// A hash of everything that samples are made from: data, tokenizer, template and knobs.
///
/// # Errors
/// A file cannot be read.
pub fn key(
    plan: &DataPlan,
    sources: &[Source],
    tokenizer: &ChatTokenizer,
    look: Look,
) -> Result<String, DataError> {
    let mut hasher = Hasher::new();
    let knobs = json!({
        "version": PIPELINE_VERSION,
        "max_seq_len": plan.max_seq_len,
        "truncate": plan.truncate,
        "wraps": plan.packing == Packing::Wrap,
        "train_on_inputs": plan.train_on_inputs,
        // What stopped a streamed run may be changed to go on.
        "forgives": (look == Look::Whole).then_some((plan.on_bad_row, &plan.waive)),
    });
    part(&mut hasher, knobs.to_string().as_bytes());
    of_tokenizer(&mut hasher, tokenizer);
    for source in sources {
        let said = json!({
            "format": source.format,
            "fields": source.plan.fields,
            "sample_by": source.plan.sample_by,
            "files": source.files.len(),
        });
        part(&mut hasher, said.to_string().as_bytes());
        for path in &source.files {
            part(&mut hasher, path.as_os_str().as_encoded_bytes());
            let hash = of_file(path, look).map_err(|source| DataError::Unreadable {
                path: path.to_path_buf(),
                source,
            })?;
            part(&mut hasher, &hash);
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// Length and bytes, so that no two lists of parts have the same bytes.
fn part(hasher: &mut Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

fn of_tokenizer(hasher: &mut Hasher, tokenizer: &ChatTokenizer) {
    for (name, content) in tokenizer.files() {
        part(hasher, name.as_bytes());
        part(hasher, content);
    }
    let ids = json!([
        tokenizer.stop_ids(),
        tokenizer.generation_ids(),
        tokenizer.bos_id(),
        tokenizer.eos_id(),
        tokenizer.pad_id(),
        tokenizer.prefix(),
    ]);
    part(hasher, ids.to_string().as_bytes());
    if let Some(template) = tokenizer.template() {
        part(hasher, template.name().as_bytes());
        part(hasher, template.source().as_bytes());
        // What such a template renders depends on the day.
        if template.source().contains("strftime_now") {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let day = since.unwrap_or_default().as_secs() / 86_400;
            part(hasher, &day.to_le_bytes());
        }
    }
}

fn of_file(path: &Path, look: Look) -> io::Result<[u8; 32]> {
    let mut hasher = Hasher::new();
    match look {
        Look::Whole => {
            let mut file = File::open(path)?;
            let mut buffer = vec![0; BUFFER];
            loop {
                let count = file.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                hasher.update_rayon(&buffer[..count]);
            }
        }
        Look::Ends => {
            let mut file = File::open(path)?;
            let length = file.metadata()?.len();
            hasher.update(&length.to_le_bytes());
            for start in [0, length.saturating_sub(ENDS)] {
                file.seek(SeekFrom::Start(start))?;
                let mut bytes = Vec::new();
                file.by_ref().take(ENDS).read_to_end(&mut bytes)?;
                hasher.update(&bytes);
            }
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
