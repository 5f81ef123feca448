//! Files of a model whose weights are random, for benchmarks that need a shape and no sense.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use lorafit::model::config::ModelConfig;
use lorafit::model::weights::expected_tensors;
use lorafit::random::Stream;
use serde_json::json;

/// Writes `model.safetensors`, all bf16, beside a `config.json`.
pub fn write(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let tensors = expected_tensors(&ModelConfig::from_dir(dir)?);
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    // Either sign and any mantissa under the exponent of 2⁻⁶: numbers of about 0.02.
    let stream = Stream::new(0);
    for i in 0..end.div_ceil(8) {
        let bits = stream.bits(i as u64) & 0x807f_807f_807f_807f | 0x3c80_3c80_3c80_3c80;
        file.write_all(&bits.to_le_bytes()[..(end - 8 * i).min(8)])?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}
