//! What the planner otherwise chooses: options of `train` and `plan`, and the group `overrides` in a file of
//! settings.

use super::CommandResult;
use crate::byte_size::ByteSize;
use crate::planner::plan::{Choices, Placement, Updates};
use crate::schedule::buffer_plan::GroupPlacement;
use clap::ValueEnum;
use ferrozero_offload::Tier;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;
use std::str::FromStr;

/// What is fixed instead of being chosen by the planner.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, Serialize, Deserialize, schemars::JsonSchema)]
#[command(next_help_heading = "What the planner otherwise chooses")]
#[serde(deny_unknown_fields, default)]
pub struct Overrides {
    /// Home of all states: device, host or disk; or four of them, of master parameters, first moments, second
    /// moments and gradients, as disk,disk,disk,host
    #[arg(long, value_name = "TIER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub placement: Option<Homes>,
    /// Home of boundary activations
    #[arg(long, value_name = "TIER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boundaries: Option<Home>,
    /// Slots of each class of groups
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<u16>,
    /// Pieces read ahead of their upload
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub look_ahead: Option<u16>,
    /// Pieces that are between disk and optimizer at once, a multiple of four
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_pieces: Option<u16>,
    /// Groups whose gradients may be on the device at once
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_sets: Option<u16>,
    /// Micro-batches that run vertically, all of them through a segment before the next one
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vertical: Option<u16>,
    /// Segments that keep what their backward needs, from the last one on, and are not computed again
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<u16>,
    /// When updates are made that clipping makes wait for the norm
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updates: Option<UpdateTime>,
    /// Size of the pieces that states are moved in, a multiple of 4KiB [default: 4MiB]
    #[arg(long, value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piece: Option<ByteSize>,
}

impl Overrides {
    /// As options of a command line, each with a space before it.
    ///
    /// # Errors
    /// None but for a value that has no text.
    pub fn as_options(&self) -> CommandResult<String> {
        let set = serde_json::to_value(self)?;
        let option = |(name, value): (&String, &Value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            format!(" --{} {value}", name.replace('_', "-"))
        };
        Ok(set.as_object().into_iter().flatten().map(option).collect())
    }

    /// As plans take them.
    pub fn choices(&self) -> Choices {
        Choices {
            placement: self.placement.map_or(Placement::Auto, Homes::placement),
            boundaries: self.boundaries.map(Home::tier),
            slots: self.slots.map(usize::from),
            look_ahead: self.look_ahead.map(usize::from),
            state_pieces: self.state_pieces.map(usize::from),
            gradient_sets: self.gradient_sets.map(usize::from),
            vertical: self.vertical.map(usize::from),
            kept: self.kept.map(usize::from),
            updates: self.updates.map(UpdateTime::updates),
            piece_bytes: self.piece.map(|size| size.0 as usize),
        }
    }
}

/// A tier in settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Home {
    /// The memory of the device that computes.
    Device,
    /// The memory of the host.
    Host,
    /// Files.
    Disk,
}

impl Home {
    fn tier(self) -> Tier {
        match self {
            Self::Device => Tier::Device,
            Self::Host => Tier::Host,
            Self::Disk => Tier::Disk,
        }
    }
}

/// When updates are made, in settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateTime {
    /// As soon as the norm is known.
    AtOnce,
    /// Each when the next forward asks for the group.
    NextForward,
}

impl UpdateTime {
    fn updates(self) -> Updates {
        match self {
            Self::AtOnce => Updates::AtOnce,
            Self::NextForward => Updates::NextForward,
        }
    }
}

/// Homes of the streams of all groups, as people write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Homes(GroupPlacement);

impl Homes {
    fn placement(self) -> Placement {
        let Self(homes) = self;
        match GroupPlacement::all(homes.master) == homes {
            true => Placement::All(homes.master),
            false => Placement::Each(homes),
        }
    }
}

impl FromStr for Homes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let tiers: Option<Vec<Tier>> =
            text.split(',').map(|name| Home::from_str(name.trim(), false).ok().map(Home::tier)).collect();
        match tiers.as_deref() {
            Some([tier]) => Ok(Self(GroupPlacement::all(*tier))),
            Some(&[master, first_moment, second_moment, gradient]) => {
                Ok(Self(GroupPlacement { master, first_moment, second_moment, gradient }))
            }
            _ => Err(format!(
                "{text:?} is no home: write device, host or disk, or four of them for master parameters, \
                 first moments, second moments and gradients, as disk,disk,disk,host"
            )),
        }
    }
}

impl fmt::Display for Homes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self(GroupPlacement { master, first_moment, second_moment, gradient }) = self;
        match self.placement() {
            Placement::All(tier) => write!(f, "{tier}"),
            _ => write!(f, "{master},{first_moment},{second_moment},{gradient}"),
        }
    }
}

impl TryFrom<String> for Homes {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Homes> for String {
    fn from(homes: Homes) -> Self {
        homes.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, FromArgMatches};

    #[test]
    fn options_are_those_of_the_command_line() {
        let settings = r#"{ "placement": "disk,disk,disk,host", "look_ahead": 2, "updates": "at-once",
            "piece": "8KiB" }"#;
        let overrides: Overrides = serde_json::from_str(settings).unwrap();
        let options = overrides.as_options().unwrap();
        let command = Overrides::augment_args(clap::Command::new("train"));
        let matches = command.try_get_matches_from(format!("train{options}").split(' ')).unwrap();
        assert_eq!(Overrides::from_arg_matches(&matches).unwrap(), overrides);
        assert_eq!(Overrides::default().as_options().unwrap(), "");
    }

    #[test]
    fn homes_are_written_as_they_are_read() {
        for text in ["disk", "host", "device,disk,disk,host"] {
            assert_eq!(text.parse::<Homes>().unwrap().to_string(), text);
        }
        assert_eq!("host, host, host, host".parse::<Homes>().unwrap().to_string(), "host");
        for wrong in ["", "nvme", "disk,disk", "disk,disk,disk,disk,disk"] {
            assert!(wrong.parse::<Homes>().unwrap_err().contains("disk,disk,disk,host"), "{wrong}");
        }
    }
}
