package pdu

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestHeaderFields(t *testing.T) {
	var h Header
	h.SetOpcode(R2T)
	h.SetDataLen(0x123456)
	h.SetLUN(0x4001000000000000)
	h.SetWord(AtITT, 0xdeadbeef)
	if h.Opcode() != R2T || h.DataLen() != 0x123456 || h.LUN() != 0x4001000000000000 || h.ITT() != 0xdeadbeef || h.Immediate() {
		t.Errorf("% x", h)
	}
	h[0] |= 0x40
	if !h.Immediate() || h.Opcode() != R2T {
		t.Error("the I bit is part of the opcode")
	}
	if Opcode(0x3e).String() == "" || R2T.String() != "R2T" {
		t.Error("names of opcodes")
	}
}

func TestTextRoundTrip(t *testing.T) {
	var text []byte
	want := []Pair{{"InitiatorName", "iqn.x:y"}, {"Empty", ""}, {"X", "a=b"}}
	for _, p := range want {
		text = AppendText(text, p.Key, p.Value)
	}
	got, err := ParseText(append(text, 0, 0))
	if err != nil || len(got) != len(want) {
		t.Fatalf("%v, %v", got, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%v, want %v", got[i], want[i])
		}
	}
	for _, bad := range []string{"x", "=y", "x=y\x00z"} {
		if _, err := ParseText([]byte(bad)); err == nil {
			t.Errorf("%q was taken for text", bad)
		}
	}
	if _, err := ParseText(bytes.Repeat([]byte("a=b\x00"), MaxKeys+1)); err == nil {
		t.Error("any number of keys is taken")
	}
}

func TestValues(t *testing.T) {
	for s, want := range map[string]uint32{"0": 0, "65536": 65536, "0x10": 16, "0Xff": 255} {
		if n, err := ParseNumber(s); err != nil || n != want {
			t.Errorf("%s is %d, %v", s, n, err)
		}
	}
	for _, bad := range []string{"", "-1", "0x", "4294967296", "1k"} {
		if _, err := ParseNumber(bad); err == nil {
			t.Errorf("%q was taken for a number", bad)
		}
	}
	for s, want := range map[string]string{"0x6869": "hi", "0x869": "\x08\x69", "0baGk=": "hi", "0Bhim5": "\x86\x29\xb9"} {
		if p, err := ParseBinary(s, 16); err != nil || string(p) != want {
			t.Errorf("%s is %q, %v", s, p, err)
		}
	}
	for _, bad := range []string{"", "hi", "0xzz", "0b!!", "0x" + string(bytes.Repeat([]byte("00"), 17))} {
		if _, err := ParseBinary(bad, 16); err == nil {
			t.Errorf("%q was taken for a binary value", bad)
		}
	}
	if s := FormatBinary([]byte{0, 0xab}); s != "0x00ab" {
		t.Error(s)
	}
}

func TestExtendedCDB(t *testing.T) {
	var h Header
	for i := range h.CDB() {
		h.CDB()[i] = byte(i)
	}
	ahs := append(binary.BigEndian.AppendUint16(nil, 9), ahsExtendedCDB, 0, 1, 2, 3, 4, 5, 6, 7, 8)
	cdb, err := ExtendCDB(&h, ahs)
	if err != nil || len(cdb) != 24 || cdb[15] != 15 || cdb[16] != 1 || cdb[23] != 8 {
		t.Errorf("% x, %v", cdb, err)
	}
	if _, err := ExtendCDB(&h, []byte{0, 5, ahsBidiRead, 0, 0, 0, 0, 1}); err == nil {
		t.Error("a bidirectional command is taken")
	}
}

func FuzzParseText(f *testing.F) {
	f.Add([]byte("InitiatorName=iqn.a\x00AuthMethod=CHAP,None\x00"))
	f.Add([]byte("CHAP_C=0x00ff\x00CHAP_R=0bAAAA\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		pairs, err := ParseText(p)
		if err != nil {
			return
		}
		var text []byte
		for _, q := range pairs {
			text = AppendText(text, q.Key, q.Value)
			_, _ = ParseNumber(q.Value)
			if b, err := ParseBinary(q.Value, 64); err == nil && len(b) > 64 {
				t.Errorf("%d bytes, at most 64 were asked for", len(b))
			}
		}
		again, err := ParseText(text)
		if err != nil || len(again) != len(pairs) {
			t.Errorf("%v does not survive: %v, %v", pairs, again, err)
		}
	})
}

func FuzzExtendCDB(f *testing.F) {
	f.Add([]byte{0, 9, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Fuzz(func(t *testing.T, ahs []byte) {
		var h Header
		cdb, err := ExtendCDB(&h, ahs)
		if err == nil && (len(cdb) < 16 || len(cdb) > 16+len(ahs)) {
			t.Errorf("a CDB of %d bytes from %d", len(cdb), len(ahs))
		}
	})
}
