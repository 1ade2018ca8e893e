package main

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"

	"firn.io/firn/internal/block"
)

const units = "KMGTP"

// sizeHelp is what commands say of SIZE.
const sizeHelp = `SIZE is 10G, 512M, 1.5T or a number of bytes. Units are binary: 10G, 10GB and
10GiB are all 10 x 2^30 bytes.`

// parseSize reads a size such as 10G, 512M, 1.5T or 4096: binary units, bytes
// without one. "GiB" and "GB" mean the same as "G".
func parseSize(s string) (int64, error) {
	bad := block.Errorf(block.Invalid, "%q is not a size; write it as 10G, 512M or 4096 (binary units: 10G, 10GB and 10GiB are the same; whole bytes)", s)
	t := strings.ToUpper(strings.TrimSpace(s))
	t = strings.TrimSuffix(strings.TrimSuffix(t, "B"), "I")
	shift := 0
	if n := len(t); n > 0 {
		if u := strings.IndexByte(units, t[n-1]); u >= 0 {
			shift, t = 10*(u+1), t[:n-1]
		}
	}
	whole, fraction, hasFraction := strings.Cut(t, ".")
	n, err := strconv.ParseUint(whole, 10, 63)
	if err != nil || hasFraction && fraction == "" || n > math.MaxInt64>>shift {
		return 0, bad
	}
	n <<= shift
	if hasFraction {
		if len(fraction) > 15 {
			return 0, bad
		}
		f, err := strconv.ParseUint(fraction, 10, 63)
		if err != nil {
			return 0, bad
		}
		ten := uint64(1)
		for range fraction {
			ten *= 10
		}
		hi, lo := bits.Mul64(f, 1<<shift)
		part, rest := bits.Div64(hi, lo, ten)
		if rest != 0 || n+part > math.MaxInt64 {
			return 0, bad
		}
		n += part
	}
	return int64(n), nil
}

// formatSize writes n as parseSize reads it if that is short, else with one decimal.
func formatSize(n int64) string {
	if n < 1<<10 {
		return strconv.FormatInt(n, 10)
	}
	shift := (bits.Len64(uint64(n)) - 1) / 10 * 10
	shift = min(shift, 10*len(units))
	unit := units[shift/10-1]
	if n%(1<<shift) == 0 {
		return fmt.Sprintf("%d%c", n>>shift, unit)
	}
	return fmt.Sprintf("%.1f%c", float64(n)/float64(int64(1)<<shift), unit)
}

// size is a flag value.
type size int64

func (s *size) Set(text string) error {
	n, err := parseSize(text)
	if err == nil {
		*s = size(n)
	}
	return err
}

func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return formatSize(int64(*s))
}

func (s *size) Type() string { return "SIZE" }
