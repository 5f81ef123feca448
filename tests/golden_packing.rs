//! Packed and left-padded rows give transformers' logits: each document as if it were alone.

use std::path::Path;
use std::sync::Arc;

use lorafit::model::{CausalLm, Tokens};

use crate::reference::{
    Case, Figures, Tensors, distance, failed, flat, load, reference, run_all, tolerance,
};

/// The wrong logits of documents that see each other are further away than this.
const ANOTHER_ANSWER: f64 = 1e-2;

fn logits(model: &CausalLm, tokens: Tokens) -> Vec<f32> {
    flat(model.logits(model.hidden(tokens, None, None)))
}

fn packing_case(path: &Path) -> Case {
    let case = Tensors::open(path);
    let name = path.file_stem().expect("a name").to_string_lossy();
    let family = name.strip_prefix("left_padding_");
    let model = load(&reference().join("models").join(family.unwrap_or(&name)))?;
    let ids = case.ints("input_ids");
    let positions: Vec<usize> = (case.ints("position_ids").iter())
        .map(|&position| position as usize)
        .collect();
    let packed = family.is_none();
    let segments = if packed {
        documents(&case)
    } else {
        pads_apart(&case)
    };
    let tokens = Tokens {
        ids: &ids,
        batch: case.shape("input_ids")[0],
        positions: Some(&positions),
        segments: Some(&segments),
    };
    let mut figures = Figures::default();
    if packed {
        check_documents(&model, tokens, &case, &mut figures)?;
    } else {
        check_left_padding(&model, tokens, &case, &mut figures);
    }
    figures.verdict()
}

fn documents(case: &Tensors) -> Arc<[usize]> {
    let starts = case.ints("cu_seqlens");
    starts.iter().map(|&start| start as usize).collect()
}

fn check_documents(
    model: &CausalLm,
    tokens: Tokens,
    case: &Tensors,
    figures: &mut Figures,
) -> Result<(), crate::reference::Verdict> {
    let packed = logits(model, tokens);
    // Positions that restart by themselves.
    let restarting = logits(
        model,
        Tokens {
            positions: None,
            ..tokens
        },
    );
    // Without segments: the answer of documents that see each other.
    let mixed = logits(
        model,
        Tokens {
            positions: None,
            segments: None,
            ..tokens
        },
    );
    for (got, name) in [
        (&packed, "logits_packed"),
        (&packed, "logits_unpacked"),
        (&restarting, "logits_packed"),
        (&mixed, "logits_without_document_mask"),
    ] {
        let off = distance(got, &case.floats(name));
        figures.check("logits", name, off, tolerance::LOGITS);
    }
    let off = distance(&packed, &case.floats("logits_without_document_mask"));
    if off < ANOTHER_ANSWER {
        return Err(failed(format!(
            "logits with and without the document mask are {off:.1e} apart: the case shows nothing"
        )));
    }
    Ok(())
}

/// The pads on the left of each row as a segment of their own.
fn pads_apart(case: &Tensors) -> Arc<[usize]> {
    let mask = case.ints("attention_mask");
    let tokens = case.shape("attention_mask")[1];
    let mut starts = vec![0];
    for row in mask.chunks_exact(tokens) {
        let end = starts[starts.len() - 1];
        let pads = row.iter().filter(|&&seen| seen == 0).count();
        starts.extend([end + pads, end + tokens]);
    }
    starts.into()
}

fn check_left_padding(model: &CausalLm, tokens: Tokens, case: &Tensors, figures: &mut Figures) {
    let mut got = logits(model, tokens);
    let vocabulary = got.len() / tokens.ids.len();
    // The reference is 0 where the mask is.
    let rows = got.chunks_exact_mut(vocabulary);
    for (row, seen) in rows.zip(case.ints("attention_mask")) {
        if seen == 0 {
            row.fill(0.0);
        }
    }
    let off = distance(&got, &case.floats("logits"));
    figures.check("logits", "logits", off, tolerance::LOGITS);
}

#[test]
fn packed_documents_equal_transformers() {
    run_all(&reference().join("packing"), packing_case);
}
