//! Every knob of a recipe, declared once: key, type and range, default, unit, effect.
//!
//! A test holds this table against the fields of [`Plan`](super::Plan).

mod adapter;
mod data;
mod train;

use super::schema::Edge::{With, Without};
use super::schema::{Edge, Kind, Knob};

/// Steps, epochs and the like: more than anyone trains, few enough for every computation.
const MANY: u64 = 1_000_000_000;
const POSITIVE: Edge = Without(0.0);
const ZERO: Edge = With(0.0);
const BELOW_ONE: Edge = Without(1.0);
const ONE: Edge = With(1.0);
const RANK: Kind = Kind::Integer(1, 65_536);
const ALPHA: Kind = Kind::Real(POSITIVE, With(1e6));

/// All knobs, in the order of a recipe.
pub static KNOBS: &[Knob] = &ALL;

const PARTS: [&[Knob]; 3] = [data::KNOBS, adapter::KNOBS, train::KNOBS];
static ALL: [Knob; PARTS[0].len() + PARTS[1].len() + PARTS[2].len()] = {
    let mut all = [PARTS[0][0]; _];
    let (mut part, mut i, mut at) = (0, 0, 0);
    while part < PARTS.len() {
        while i < PARTS[part].len() {
            all[at] = PARTS[part][i];
            (i, at) = (i + 1, at + 1);
        }
        (part, i) = (part + 1, 0);
    }
    all
};
