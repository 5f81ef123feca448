//! Which weights these are, without reading all of them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::weights::Weights;

/// Bytes of each end, and of the middle, of a tensor that a fingerprint sees.
const SAMPLE: usize = 4096;
/// Bytes of each end of a GGUF file that a fingerprint sees.
const END: u64 = 4 << 20;

impl Weights {
    /// A hash (BLAKE3) of every tensor's name, shape and type, and of a part of its bytes: training or
    /// merging changes all of a tensor, so that a part tells. How the tensors lie in files does not matter.
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        if let Some(file) = self.gguf() {
            // Whether it can be read was found out when it was opened.
            let _ = hash_ends(file.path(), &mut hash);
        }
        for name in self.names() {
            hash.update(name.as_bytes());
            hash.update(format!("{:?}{:?}", self.shape(name), self.dtype(name)).as_bytes());
            if let Ok(Some(raw)) = self.raw(name) {
                let last = raw.len().saturating_sub(SAMPLE);
                for at in [0, last / 2, last] {
                    hash.update(&raw[at..(at + SAMPLE).min(raw.len())]);
                }
            }
        }
        hash.finalize().to_hex()[..32].to_string()
    }
}

fn hash_ends(path: &Path, hash: &mut blake3::Hasher) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    for at in [0, length.saturating_sub(END)] {
        file.seek(SeekFrom::Start(at))?;
        hash.update_reader(file.by_ref().take(END))?;
    }
    Ok(())
}
