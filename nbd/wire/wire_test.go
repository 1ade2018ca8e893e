package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// The hex strings were written by hand from doc/proto.md.
func TestBytes(t *testing.T) {
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"greeting", AppendGreeting(nil, FixedNewstyle|NoZeroes), "4e42444d41474943 49484156454f5054 0003"},
		{"client flags", AppendClientFlags(nil, ClientFixedNewstyle), "00000001"},
		{"option", AppendOption(nil, OptGo, []byte("x")), "49484156454f5054 00000007 00000001 78"},
		{"option reply", AppendOptReply(nil, OptInfo, RepErrUnknown, nil), "0003e889045565a9 00000006 80000006 00000000"},
		{"export name", AppendExportName(nil, 4096, HasFlags|SendTrim, false), "0000000000001000 0021"},
		{"info request", AppendInfoRequest(nil, "v", InfoBlockSize), "00000001 76 0001 0003"},
		{"info export", AppendInfoExport(nil, 1, HasFlags), "0000 0000000000000001 0001"},
		{"info name", AppendInfoText(nil, InfoName, "n"), "0001 6e"},
		{"info blocks", AppendInfoBlockSize(nil, BlockSizes{1, 4096, 1 << 25}), "0003 00000001 00001000 02000000"},
		{"server", AppendServer(nil, "a", "b"), "00000001 61 62"},
		{"meta request", AppendMetaRequest(nil, "e", "base:"), "00000001 65 00000001 00000005 626173653a"},
		{"meta context", AppendMetaContext(nil, 9, "c"), "00000009 63"},
		{"request", AppendRequest(nil, Request{FlagFUA, CmdWrite, 7, 512, 8}), "25609513 0001 0001 0000000000000007 0000000000000200 00000008"},
		{"simple", AppendSimpleReply(nil, 7, EIO), "67446698 00000005 0000000000000007"},
		{"none", AppendNone(nil, 7), "668e33ef 0001 0000 0000000000000007 00000000"},
		{"data", AppendOffsetData(nil, 7, false, 9, 3), "668e33ef 0000 0001 0000000000000007 0000000b 0000000000000009"},
		{"hole", AppendOffsetHole(nil, 7, true, 9, 3), "668e33ef 0001 0002 0000000000000007 0000000c 0000000000000009 00000003"},
		{"error", AppendError(nil, 7, EINVAL, "no"), "668e33ef 0001 8001 0000000000000007 00000008 00000016 0002 6e6f"},
		{"error at", AppendErrorOffset(nil, 7, true, EIO, "", 4), "668e33ef 0001 8002 0000000000000007 0000000e 00000005 0000 0000000000000004"},
		{"status", AppendState(AppendBlockStatus(nil, 7, true, 1, 1), State{4096, StateHole | StateZero}),
			"668e33ef 0001 0005 0000000000000007 0000000c 00000001 00001000 00000003"},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(c.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.got, want) {
			t.Errorf("%s: got %x, want %x", c.name, c.got, want)
		}
	}
	if n := len(AppendExportName(nil, 0, 0, true)); n != 134 {
		t.Errorf("padded answer to EXPORT_NAME has %d bytes", n)
	}
}

func TestRefused(t *testing.T) {
	long := strings.Repeat("n", MaxName+1)
	for name, f := range map[string]func() error{
		"greeting": func() error { _, err := ParseGreeting(make([]byte, GreetingLen)); return err },
		"oldstyle greeting": func() error {
			_, err := ParseGreeting([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53.."))
			return err
		},
		"client flags":        func() error { _, err := ParseClientFlags([]byte{0, 0, 0, 4}); return err },
		"option magic":        func() error { _, _, err := ParseOptionHeader(make([]byte, OptionHeaderLen)); return err },
		"long name":           func() error { _, err := ParseInfoRequest(AppendInfoRequest(nil, long)); return err },
		"name with zero":      func() error { _, err := ParseName([]byte("a\x00b")); return err },
		"name not UTF-8":      func() error { _, err := ParseName([]byte{0xff}); return err },
		"claimed name":        func() error { _, err := ParseInfoRequest([]byte{0xff, 0xff, 0xff, 0xff, 'a', 0, 0}); return err },
		"claimed infos":       func() error { _, err := ParseInfoRequest([]byte{0, 0, 0, 0, 0xff, 0xff}); return err },
		"claimed queries":     func() error { _, err := ParseMetaRequest([]byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}); return err },
		"after the queries":   func() error { _, err := ParseMetaRequest([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1}); return err },
		"request magic":       func() error { _, err := ParseRequest(make([]byte, RequestLen)); return err },
		"reply":               func() error { _, err := ParseReply(make([]byte, SimpleReplyLen)); return err },
		"error text":          func() error { _, _, _, err := ParseError(ChunkError, []byte{0, 0, 0, 5, 0, 9}); return err },
		"error without errno": func() error { _, _, _, err := ParseError(ChunkError, make([]byte, 6)); return err },
		"empty status":        func() error { _, _, err := ParseBlockStatus(nil, make([]byte, 4)); return err },
		"empty extent":        func() error { _, _, err := ParseBlockStatus(nil, make([]byte, 12)); return err },
		"offset":              func() error { _, _, err := ParseOffset(make([]byte, 7), false); return err },
	} {
		if err := f(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCut(t *testing.T) {
	for in, want := range map[string]string{
		"":                              "",
		"a\x00b":                        "a b",
		"\xff":                          "?",
		strings.Repeat("a", MaxName+9):  strings.Repeat("a", MaxName),
		strings.Repeat("a", 4095) + "é": strings.Repeat("a", 4095),
	} {
		if got := Cut(in); got != want {
			t.Errorf("Cut(%.20q) has %d bytes, want %d", in, len(got), len(want))
		}
	}
}

func TestMatchesBaseAllocation(t *testing.T) {
	for _, c := range []struct {
		query     string
		list, set bool
	}{
		{"base:allocation", true, true}, {"base:", true, false}, {"base", false, false}, {"", false, false},
		{"base:all", false, false}, {"qemu:", false, false},
	} {
		if MatchesBaseAllocation(c.query, true) != c.list || MatchesBaseAllocation(c.query, false) != c.set {
			t.Errorf("%q", c.query)
		}
	}
}

func TestParseAllocatesNothing(t *testing.T) {
	req := AppendRequest(nil, Request{Command: CmdRead, Cookie: 1, Offset: 4096, Length: 4096})
	rep := AppendSimpleReply(nil, 1, 0)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := ParseRequest(req); err != nil {
			t.Fatal(err)
		}
		if _, err := ParseReply(rep); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzHandshake: what parses is encoded again to the same bytes.
func FuzzHandshake(f *testing.F) {
	f.Add(AppendGreeting(nil, FixedNewstyle))
	f.Add(AppendClientFlags(nil, ClientNoZeroes))
	f.Add(AppendOption(nil, OptList, nil))
	f.Add(AppendOptReply(nil, OptGo, RepAck, nil))
	f.Add(AppendInfoRequest(nil, "vol", InfoName, InfoBlockSize))
	f.Add(AppendMetaRequest(nil, "vol", "base:", BaseAllocation))
	f.Add(AppendInfoExport(nil, 1<<40, HasFlags|SendFlush))
	f.Add(AppendInfoBlockSize(nil, BlockSizes{1, 4096, MaxPayload}))
	f.Add(AppendServer(nil, "vol", "a volume"))
	f.Fuzz(func(t *testing.T, p []byte) {
		same := func(what string, got []byte) {
			if !bytes.Equal(got, p) {
				t.Fatalf("%s %x is encoded as %x", what, p, got)
			}
		}
		if fl, err := ParseGreeting(p); err == nil {
			same("greeting", AppendGreeting(nil, fl))
		}
		if fl, err := ParseClientFlags(p); err == nil {
			same("client flags", AppendClientFlags(nil, fl))
		}
		if o, n, err := ParseOptionHeader(p); err == nil && n == 0 {
			same("option", AppendOption(nil, o, nil))
		}
		if o, r, n, err := ParseOptReplyHeader(p); err == nil && n == 0 {
			same("option reply", AppendOptReply(nil, o, r, nil))
		}
		if r, err := ParseInfoRequest(p); err == nil {
			same("information request", AppendInfoRequest(nil, r.Name, r.Want...))
		}
		if r, err := ParseMetaRequest(p); err == nil {
			same("metadata request", AppendMetaRequest(nil, r.Export, r.Queries...))
		}
		if id, name, err := ParseMetaContext(p); err == nil {
			same("metadata context", AppendMetaContext(nil, id, name))
		}
		if name, desc, err := ParseServer(p); err == nil {
			same("server", AppendServer(nil, name, desc))
		}
		if r, err := ParseInfoReply(p); err == nil {
			switch r.Type {
			case InfoExport:
				same("export", AppendInfoExport(nil, r.Size, r.Flags))
			case InfoName, InfoDescription:
				same("text", AppendInfoText(nil, r.Type, r.Text))
			case InfoBlockSize:
				same("block sizes", AppendInfoBlockSize(nil, r.Blocks))
			}
		}
	})
}

// FuzzTransmission: what parses is encoded again to the same bytes.
func FuzzTransmission(f *testing.F) {
	f.Add(AppendRequest(nil, Request{FlagDF, CmdRead, 1, 2, 3}))
	f.Add(AppendSimpleReply(nil, 1, ENOSPC))
	f.Add(AppendOffsetData(nil, 1, true, 2, 0))
	f.Add(AppendOffsetHole(nil, 1, true, 2, 3))
	f.Add(AppendError(nil, 1, EIO, "text"))
	f.Add(AppendErrorOffset(nil, 1, true, EIO, "text", 9))
	f.Add(AppendState(AppendBlockStatus(nil, 1, true, 2, 1), State{1, 0}))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) >= RequestLen {
			if r, err := ParseRequest(p[:RequestLen]); err == nil && !bytes.Equal(AppendRequest(nil, r), p[:RequestLen]) {
				t.Fatalf("%+v from %x", r, p)
			}
		}
		if len(p) < 4 || ReplyLen(p) == 0 || len(p) < ReplyLen(p) {
			return
		}
		head, body := p[:ReplyLen(p)], p[ReplyLen(p):]
		r, err := ParseReply(head)
		if err != nil {
			t.Fatalf("ReplyLen knows %x: %v", p, err)
		}
		switch {
		case r.Simple:
			if got := AppendSimpleReply(nil, r.Cookie, r.Errno); !bytes.Equal(got, head) {
				t.Fatalf("%x from %x", got, head)
			}
		case r.Type.IsError():
			if e, text, off, err := ParseError(r.Type, body); err == nil {
				again := AppendError(nil, r.Cookie, e, text)
				if r.Type == ChunkErrorOffset {
					again = AppendErrorOffset(nil, r.Cookie, true, e, text, off)
				}
				if (r.Type == ChunkError || r.Type == ChunkErrorOffset) && !bytes.Equal(again[ChunkHeaderLen:], body) {
					t.Fatalf("%x from %x", again, p)
				}
			}
		case r.Type == ChunkBlockStatus:
			if ctx, states, err := ParseBlockStatus(nil, body); err == nil {
				again := AppendBlockStatus(nil, r.Cookie, true, ctx, len(states))
				for _, s := range states {
					again = AppendState(again, s)
				}
				if !bytes.Equal(again[ChunkHeaderLen:], body) {
					t.Fatalf("%x from %x", again, p)
				}
			}
		default:
			off, n, err := ParseOffset(body, r.Type == ChunkOffsetHole)
			if r.Type == ChunkOffsetHole && err == nil {
				again := AppendOffsetHole(nil, r.Cookie, true, off, int(n))
				if !bytes.Equal(again[ChunkHeaderLen:], body) {
					t.Fatalf("%x from %x", again, p)
				}
			}
		}
	})
}
