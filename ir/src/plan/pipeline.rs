//! Pipeline settings: what the driver does with the programs of a plan.

use serde::{Deserialize, Serialize};

/// Settings of the pipeline a plan was compiled for.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Pipeline {}
