//! What the user who starts a transfer may choose, and the words for it.
//!
//! Owns [`DivergencePolicy`] and [`Mode`], as they travel in an offer and as a user writes them. Refuses to know what comes of a policy:
//! [`crate::resolution::way`] is the table.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What shall happen when the histories have gone apart; [`crate::resolution::way`] is the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DivergencePolicy {
    /// 0: nothing; the evidence is shown.
    #[default]
    Refuse,
    /// 1: the incoming history lands as a new volume.
    Fork,
    /// 2: the receiver's history wins, the sender keeps its own as a fork.
    Ours,
    /// 3: the incoming history takes the name, the receiver keeps its own as a fork.
    Theirs,
}

impl fmt::Display for DivergencePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Refuse => "refuse",
            Self::Fork => "fork",
            Self::Ours => "ours",
            Self::Theirs => "theirs",
        })
    }
}

/// Text that names no [`DivergencePolicy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a way to treat a divergence: write refuse, fork, ours or theirs")]
pub struct UnknownPolicy {
    /// The text as given.
    pub text: String,
}

impl FromStr for DivergencePolicy {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "fork" => Ok(Self::Fork),
            "ours" => Ok(Self::Ours),
            "theirs" => Ok(Self::Theirs),
            _ => Err(UnknownPolicy { text: text.to_owned() }),
        }
    }
}

/// Whether a push or pull acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// 0: it acts.
    #[default]
    Run,
    /// 1: it only says what it would do: the sender concludes instead of beginning a step.
    DryRun,
}
