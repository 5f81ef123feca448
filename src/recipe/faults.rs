//! What is wrong with a recipe, all of it at once.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// One thing that is wrong with a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The recipe; `None` when the fault came from a `--set`.
    pub file: Option<PathBuf>,
    /// Line in the recipe, counted from 1, where one is to blame.
    pub line: Option<usize>,
    /// The `key=value` of the `--set` that is at fault.
    pub set: Option<String>,
    /// Dotted key of the knob, such as `train.learning_rate`; empty when the file as a whole is meant.
    pub key: String,
    /// What was found and what was expected.
    pub message: String,
    /// What to do about it; may be empty.
    pub remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(set) = &self.set {
            write!(f, "--set {set}: ")?;
        }
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
            write!(f, ": ")?;
        }
        // The argument of a `--set` already begins with the key.
        if !self.key.is_empty() && self.set.is_none() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}", self.message)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Everything that is wrong with a recipe: in the order of its lines, then of the `--set`s.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    /// The faults.
    pub list: Vec<Fault>,
    /// How many more there are, where a file is so broken that listing them would not help.
    pub omitted: usize,
}

impl From<Fault> for Faults {
    fn from(fault: Fault) -> Self {
        Faults {
            list: vec![fault],
            omitted: 0,
        }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.list.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{fault}")?;
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
