package pdu

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Limits of text (RFC 7143, 6.1): keys are at most 63 bytes; a value is bound
// here by what the largest (a CHAP challenge of 1024 bytes in hex) needs.
const (
	MaxKeys     = 128
	maxKeyLen   = 63
	maxValueLen = 8192
)

// Pair is one key and its value.
type Pair struct{ Key, Value string }

// ParseText splits the data of login and text PDUs: key=value, each ended by a
// zero byte. A last pair without one is accepted, as are empty pairs (padding).
func ParseText(data []byte) ([]Pair, error) {
	var pairs []Pair
	for len(data) > 0 {
		var line []byte
		line, data, _ = bytes.Cut(data, []byte{0})
		if len(line) == 0 {
			continue
		}
		key, value, ok := bytes.Cut(line, []byte{'='})
		switch {
		case !ok:
			return nil, fmt.Errorf("pdu: text without '=': %.40q", line)
		case len(key) == 0 || len(key) > maxKeyLen:
			return nil, fmt.Errorf("pdu: text key of %d bytes", len(key))
		case len(value) > maxValueLen:
			return nil, fmt.Errorf("pdu: value of %s has %d bytes, at most %d are taken", key, len(value), maxValueLen)
		case len(pairs) == MaxKeys:
			return nil, fmt.Errorf("pdu: more than %d keys", MaxKeys)
		}
		pairs = append(pairs, Pair{string(key), string(value)})
	}
	return pairs, nil
}

// AppendText appends key=value and a zero byte.
func AppendText(dst []byte, key, value string) []byte {
	dst = append(dst, key...)
	dst = append(dst, '=')
	dst = append(dst, value...)
	return append(dst, 0)
}

// ParseNumber reads a numerical value: decimal, or hex after 0x.
func ParseNumber(s string) (uint32, error) {
	var n uint64
	var err error
	if h, ok := cutHex(s); ok {
		n, err = strconv.ParseUint(h, 16, 32)
	} else {
		n, err = strconv.ParseUint(s, 10, 32)
	}
	if err != nil {
		return 0, fmt.Errorf("pdu: %q is no number of 32 bits", s)
	}
	return uint32(n), nil
}

func cutHex(s string) (string, bool) {
	if strings.HasPrefix(s, "0x") || strings.HasPrefix(s, "0X") {
		return s[2:], true
	}
	return "", false
}

// ParseBinary reads a large binary value: hex after 0x or base64 after 0b
// (6.1). The result is at most limit bytes.
func ParseBinary(s string, limit int) ([]byte, error) {
	var p []byte
	var err error
	if h, ok := cutHex(s); ok {
		if len(h)%2 == 1 {
			h = "0" + h
		}
		if len(h)/2 > limit {
			return nil, fmt.Errorf("pdu: binary value of %d bytes, at most %d are taken", len(h)/2, limit)
		}
		p, err = hex.DecodeString(h)
	} else if strings.HasPrefix(s, "0b") || strings.HasPrefix(s, "0B") {
		b := strings.TrimRight(s[2:], "=")
		if base64.RawStdEncoding.DecodedLen(len(b)) > limit {
			return nil, fmt.Errorf("pdu: binary value of %d characters, at most %d bytes are taken", len(b), limit)
		}
		p, err = base64.RawStdEncoding.DecodeString(b)
	} else {
		return nil, fmt.Errorf("pdu: a binary value begins with 0x or 0b")
	}
	if err != nil {
		return nil, fmt.Errorf("pdu: binary value: %w", err)
	}
	return p, nil
}

// FormatBinary writes p as a large binary value, in hex.
func FormatBinary(p []byte) string { return "0x" + hex.EncodeToString(p) }
