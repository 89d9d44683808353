//! In which order the driver does what programs leave open.

/// When the operations of streams run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Each operation runs when it is enqueued. Finds wrong numbers, bad launches and bad addresses.
    Eager,
    /// No operation runs before something waits for it. Finds waits that are missing, and buffers that are
    /// used again or freed too early.
    Late,
    /// Streams advance at random. Finds what depends on an order that neither extreme has.
    Random {
        /// What the random order is made from.
        seed: u64,
    },
}

/// In which order the blocks of a grid run, and the warps of a block between two barriers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The first one first.
    Forward,
    /// The last one first. Finds kernels that depend on the order, and barriers that are missing.
    Reverse,
}

/// How a driver behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Configuration {
    /// When the operations of streams run.
    pub mode: Mode,
    /// In which order blocks and warps run.
    pub order: Order,
}

impl Configuration {
    /// What `SIMCUDA_MODE`, `SIMCUDA_SEED` and `SIMCUDA_ORDER` say, by default eager, 1 and forward.
    ///
    /// # Errors
    /// A sentence that names the variable whose value is not understood.
    pub fn from_environment() -> Result<Self, String> {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        Self::parse(&variable("SIMCUDA_MODE"), &variable("SIMCUDA_SEED"), &variable("SIMCUDA_ORDER"))
    }

    fn parse(mode: &str, seed: &str, order: &str) -> Result<Self, String> {
        let seed = match seed {
            "" => 1,
            _ => seed.parse().map_err(|_| format!("SIMCUDA_SEED={seed} is not a number"))?,
        };
        let mode = match mode {
            "" | "eager" => Mode::Eager,
            "late" => Mode::Late,
            "random" => Mode::Random { seed },
            _ => return Err(format!("SIMCUDA_MODE={mode} is none of eager, late and random")),
        };
        let order = match order {
            "" | "forward" => Order::Forward,
            "reverse" => Order::Reverse,
            _ => return Err(format!("SIMCUDA_ORDER={order} is neither forward nor reverse")),
        };
        Ok(Self { mode, order })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_understood_or_refused() {
        let late = Configuration { mode: Mode::Late, order: Order::Reverse };
        assert_eq!(Configuration::parse("late", "", "reverse"), Ok(late));
        let random = Configuration { mode: Mode::Random { seed: 7 }, order: Order::Forward };
        assert_eq!(Configuration::parse("random", "7", ""), Ok(random));
        assert!(Configuration::parse("lazy", "", "").is_err());
        assert!(Configuration::parse("", "x", "").is_err());
        assert!(Configuration::parse("", "", "1").is_err());
    }
}
