//! The angles by which queries and keys are turned at each position (Su et al., arXiv 2104.09864), and how
//! they are stretched for longer sequences than a model was first trained on.

use super::reader::Reader;
use crate::error::{Error, Result};
use serde_json::Value;
use std::f64::consts::TAU;

/// Angles of positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the angles.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
}

/// How the angles of positions are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by the same factor (Chen et al., arXiv 2306.15595).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Slow ones by a factor, fast ones not, those between in part, as Llama 3.1.
    Llama3 {
        /// Factor of the slow ones.
        factor: f64,
        /// Waves longer than the original sequence over this are slow.
        low: f64,
        /// Waves shorter than the original sequence over this are fast.
        high: f64,
        /// Sequence of the first training.
        original: f64,
    },
    /// Slow ones by a factor, fast ones not, those between in part along the pairs (YaRN, Peng et al., arXiv
    /// 2309.00071).
    Yarn {
        /// Factor of the slow ones.
        factor: f64,
        /// Turns in the original sequence from which on a pair is fast.
        fast: f64,
        /// Turns in the original sequence up to which a pair is slow.
        slow: f64,
        /// Whether the borders between them are whole numbers of pairs.
        truncate: bool,
        /// Sequence of the first training.
        original: f64,
        /// Factor on cosines and sines: the square root of the paper's temperature, over which attention is
        /// made.
        attention: f64,
    },
    /// Each pair by a factor of its own, which LongRoPE has two sets of, for short and for long sequences
    /// (Ding et al., arXiv 2402.13753).
    Factors {
        /// The factor of each pair.
        factors: Vec<f64>,
        /// Factor on cosines and sines.
        attention: f64,
    },
}

impl Rope {
    /// Reads it for sequences of so many tokens, at most those that the model is made for: where the stretch
    /// depends on the length, as transformers stretches a text of that length. Newer configurations keep
    /// everything of the angles in one object, older ones beside it.
    pub(super) fn read(reader: &Reader, sequence: usize) -> Result<Self> {
        let value = ["rope_parameters", "rope_scaling"].iter().find_map(|key| reader.present(key));
        let rope = value.map(|value| Reader { value, source: reader.source });
        let theta = match &rope {
            Some(rope) if rope.present("rope_theta").is_some() => rope.number("rope_theta", None)?,
            _ => reader.number("rope_theta", Some(10_000.0))?,
        };
        let scaling = rope.map_or(Ok(RopeScaling::None), |rope| scaling(&rope, reader, sequence))?;
        Ok(Self { theta, scaling })
    }

    /// Angle a position of each pair of the elements of a head of an even width, `head_width / 2` numbers.
    pub fn frequencies(&self, head_width: usize) -> Vec<f32> {
        let base = f64::from(self.theta as f32);
        (0..head_width / 2)
            .map(|pair| {
                let exponent = (2 * pair) as f32 / head_width as f32;
                let frequency = 1.0 / base.powf(f64::from(exponent));
                match &self.scaling {
                    RopeScaling::None => frequency as f32,
                    RopeScaling::Factors { factors, .. } => {
                        // As many as pairs, which the configuration was checked for.
                        (frequency / factors.get(pair).unwrap_or(&1.0)) as f32
                    }
                    RopeScaling::Linear { factor } => (frequency / factor) as f32,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let wave = TAU / frequency;
                        if wave < original / high {
                            frequency as f32
                        } else if wave > original / low {
                            (frequency / factor) as f32
                        } else {
                            let fast = (original / wave - low) / (high - low);
                            ((1.0 - fast) * frequency / factor + fast * frequency) as f32
                        }
                    }
                    RopeScaling::Yarn { factor, fast, slow, truncate, original, .. } => {
                        // The pair that turns so many times in the original sequence.
                        let pair_of = |turns: f64| {
                            head_width as f64 * (original / (turns * TAU)).ln() / (2.0 * base.ln())
                        };
                        let (first, last) = (pair_of(*fast), pair_of(*slow));
                        let (first, last) =
                            if *truncate { (first.floor(), last.ceil()) } else { (first, last) };
                        let (first, last) = (first.max(0.0), last.min(head_width as f64 - 1.0));
                        let width = if first == last { 0.001 } else { last - first };
                        let slow = ((pair as f64 - first) / width).clamp(0.0, 1.0);
                        (slow * frequency / factor + (1.0 - slow) * frequency) as f32
                    }
                }
            })
            .collect()
    }

    /// Factor on cosines and sines.
    pub fn magnitude(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn { attention, .. } | RopeScaling::Factors { attention, .. } => *attention,
            _ => 1.0,
        }
    }
}

/// `model` is the configuration around `rope`.
fn scaling(rope: &Reader, model: &Reader, sequence: usize) -> Result<RopeScaling> {
    let kind = rope.present("rope_type").or_else(|| rope.present("type")).and_then(Value::as_str);
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        // It begins to stretch behind the length that the model is made for, beyond which no sequence here
        // goes.
        "dynamic" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: rope.number("factor", None)? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: rope.number("factor", None)?,
            low: rope.number("low_freq_factor", None)?,
            high: rope.number("high_freq_factor", None)?,
            original: rope.number("original_max_position_embeddings", None)?,
        }),
        "yarn" => {
            let factor = rope.number("factor", None)?;
            let longest = model.number("max_position_embeddings", Some(2048.0))?;
            let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
            let default = match (rope.present("mscale"), rope.present("mscale_all_dim")) {
                (Some(_), Some(_)) => {
                    magnitude(rope.number("mscale", None)?) / magnitude(rope.number("mscale_all_dim", None)?)
                }
                _ => magnitude(1.0),
            };
            Ok(RopeScaling::Yarn {
                factor,
                fast: rope.number("beta_fast", Some(32.0))?,
                slow: rope.number("beta_slow", Some(1.0))?,
                truncate: rope.flag("truncate", true)?,
                original: rope.number("original_max_position_embeddings", Some(longest))?,
                attention: rope.number("attention_factor", Some(default))?,
            })
        }
        "longrope" => {
            let (short, long) = ("short_factor", "long_factor");
            let original = || rope.number("original_max_position_embeddings", None);
            let is_one = rope.present(short) == rope.present(long);
            let key = if is_one || sequence as f64 > original()? { long } else { short };
            let factors = rope.present(key).and_then(Value::as_array).and_then(|factors| {
                let above_0 = |factor: &f64| factor.is_finite() && *factor > 0.0;
                factors.iter().map(|factor| factor.as_f64().filter(above_0)).collect()
            });
            let attention = match rope.present("attention_factor") {
                Some(_) => rope.number("attention_factor", None)?,
                None => {
                    let (original, longest) = (original()?, model.number("max_position_embeddings", None)?);
                    let factor = (longest / original).max(1.0);
                    (1.0 + factor.ln() / original.ln()).sqrt()
                }
            };
            Ok(RopeScaling::Factors {
                factors: factors.ok_or_else(|| rope.wrong(key, "a list of numbers above 0"))?,
                attention,
            })
        }
        other => Err(Error::Unsupported(format!(
            "{}: rope type {other:?} is not implemented; default, linear, dynamic, llama3, yarn and longrope \
             are",
            rope.source
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rope(scaling: Value) -> Result<Rope> {
        rope_for(scaling, 64)
    }

    fn rope_for(scaling: Value, sequence: usize) -> Result<Rope> {
        let value =
            json!({ "rope_theta": 500_000.0, "max_position_embeddings": 256, "rope_scaling": scaling });
        Rope::read(&Reader { value: &value, source: "config.json" }, sequence)
    }

    #[test]
    fn factors_of_pairs_stretch_as_the_formula_that_they_were_made_by() {
        let llama3 = rope(json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }));
        let (plain, expected) = (rope(Value::Null).unwrap().frequencies(32), llama3.unwrap().frequencies(32));
        let factors: Vec<f32> = plain.iter().zip(&expected).map(|(plain, slow)| plain / slow).collect();
        assert!(
            factors[0] == 1.0 && factors[15] == 8.0 && factors.iter().any(|&f| 1.0 < f && f < 8.0),
            "{factors:?}"
        );
        let of = |short: &[f32], long: &[f32]| {
            rope(json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": 1.25,
            }))
        };
        let found = of(&factors, &factors).unwrap();
        assert_eq!(found.magnitude(), 1.25);
        for (found, expected) in found.frequencies(32).iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-6, "{found} for {expected}");
        }
        assert!(of(&[0.0], &[0.0]).unwrap_err().to_string().contains("long_factor is [0.0]"));
    }

    #[test]
    fn factors_are_those_of_the_sequences_length() {
        let scaling = |original: Value| {
            json!({
                "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0],
                "original_max_position_embeddings": original,
            })
        };
        let of = |sequence| rope_for(scaling(64.into()), sequence).unwrap();
        let frequencies = |factors: [f32; 2]| {
            let plain = rope(Value::Null).unwrap().frequencies(4);
            plain.iter().zip(factors).map(|(plain, factor)| plain / factor).collect::<Vec<_>>()
        };
        assert_eq!(of(64).frequencies(4), frequencies([1.0, 2.0]));
        assert_eq!(of(65).frequencies(4), frequencies([4.0, 8.0]));
        // √(1 + ln 4 / ln 64), whatever the length.
        for sequence in [64, 65] {
            assert!((of(sequence).magnitude() - (4.0_f64 / 3.0).sqrt()).abs() < 1e-12);
        }
        let error = rope_for(scaling(Value::Null), 64).unwrap_err().to_string();
        assert!(error.contains("original_max_position_embeddings"), "{error}");
    }

    #[test]
    fn a_dynamic_stretch_begins_behind_the_length_that_a_model_is_made_for() {
        let dynamic = rope_for(json!({ "rope_type": "dynamic", "factor": 4.0 }), 256).unwrap();
        assert_eq!(dynamic, rope(Value::Null).unwrap());
    }
}
