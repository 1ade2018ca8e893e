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
	to, ext := To{Cookie: 7, Offset: 9}, To{Cookie: 7, Offset: 9, Headers: ExtendedHeaders}
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
		{"request", AppendRequest(nil, SimpleReplies, Request{FlagFUA, CmdWrite, 7, 512, 8}), "25609513 0001 0001 0000000000000007 0000000000000200 00000008"},
		{"simple", AppendSimpleReply(nil, 7, EIO), "67446698 00000005 0000000000000007"},
		{"none", AppendNone(nil, to), "668e33ef 0001 0000 0000000000000007 00000000"},
		{"data", AppendOffsetData(nil, to, false, 9, 3), "668e33ef 0000 0001 0000000000000007 0000000b 0000000000000009"},
		{"hole", AppendOffsetHole(nil, to, true, 9, 3), "668e33ef 0001 0002 0000000000000007 0000000c 0000000000000009 00000003"},
		{"error", AppendError(nil, to, EINVAL, "no"), "668e33ef 0001 8001 0000000000000007 00000008 00000016 0002 6e6f"},
		{"error at", AppendErrorOffset(nil, to, true, EIO, "", 4), "668e33ef 0001 8002 0000000000000007 0000000e 00000005 0000 0000000000000004"},
		{"status", AppendBlockStatus(nil, to, true, 1, []State{{4096, StateHole | StateZero}}),
			"668e33ef 0001 0005 0000000000000007 0000000c 00000001 00001000 00000003"},
		{"extended request", AppendRequest(nil, ExtendedHeaders, Request{FlagFUA | FlagPayloadLen, CmdWrite, 7, 512, 8}),
			"21e41c71 0021 0001 0000000000000007 0000000000000200 0000000000000008"},
		{"extended trim", AppendRequest(nil, ExtendedHeaders, Request{0, CmdTrim, 7, 512, 1 << 40}),
			"21e41c71 0000 0004 0000000000000007 0000000000000200 0000010000000000"},
		{"extended none", AppendNone(nil, ext), "6e8a278c 0001 0000 0000000000000007 0000000000000009 0000000000000000"},
		{"extended data", AppendOffsetData(nil, ext, false, 10, 3), "6e8a278c 0000 0001 0000000000000007 0000000000000009 000000000000000b 000000000000000a"},
		{"extended hole", AppendOffsetHole(nil, ext, true, 10, 3), "6e8a278c 0001 0002 0000000000000007 0000000000000009 000000000000000c 000000000000000a 00000003"},
		{"extended error", AppendError(nil, ext, EINVAL, "no"), "6e8a278c 0001 8001 0000000000000007 0000000000000009 0000000000000008 00000016 0002 6e6f"},
		{"extended status", AppendBlockStatus(nil, ext, true, 1, []State{{1 << 40, StateHole | StateZero}, {4096, 0}}),
			"6e8a278c 0001 0006 0000000000000007 0000000000000009 0000000000000028 00000001 00000002 0000010000000000 0000000000000003 0000000000001000 0000000000000000"},
		{"status payload", AppendStatusPayload(nil, 1<<40, 1), "0000010000000000 00000001"},
		{"session", AppendSession(nil, Session{[16]byte{1}, 2, 3}), "01000000000000000000000000000000 00000002 0000000000000003"},
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
		"request magic":       func() error { _, err := ParseRequest(make([]byte, RequestLen), SimpleReplies); return err },
		"reply":               func() error { _, err := ParseReply(make([]byte, SimpleReplyLen)); return err },
		"error text":          func() error { _, _, _, err := ParseError(ChunkError, []byte{0, 0, 0, 5, 0, 9}); return err },
		"error without errno": func() error { _, _, _, err := ParseError(ChunkError, make([]byte, 6)); return err },
		"empty status":        func() error { _, _, err := ParseBlockStatus(nil, ChunkBlockStatus, make([]byte, 4)); return err },
		"empty extent":        func() error { _, _, err := ParseBlockStatus(nil, ChunkBlockStatus, make([]byte, 12)); return err },
		"extended request": func() error {
			_, err := ParseRequest(AppendRequest(nil, SimpleReplies, Request{Length: 1<<32 - 1}), ExtendedHeaders)
			return err
		},
		"extended status": func() error {
			_, _, err := ParseBlockStatus(nil, ChunkBlockStatusExt, append(make([]byte, 7), bytes.Repeat([]byte{2}, 17)...))
			return err
		},
		"short status payload": func() error { _, _, err := ParseStatusPayload(make([]byte, 7)); return err },
		"odd status payload":   func() error { _, _, err := ParseStatusPayload(make([]byte, 10)); return err },
		"short session":        func() error { _, err := ParseSession(make([]byte, 27)); return err },
		"session without id":   func() error { _, err := ParseSession(make([]byte, 28)); return err },
		"offset":               func() error { _, _, err := ParseOffset(make([]byte, 7), false); return err },
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
	req := AppendRequest(nil, SimpleReplies, Request{Command: CmdRead, Cookie: 1, Offset: 4096, Length: 4096})
	rep := AppendSimpleReply(nil, 1, 0)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := ParseRequest(req, SimpleReplies); err != nil {
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
	f.Add(AppendSession(nil, Session{[16]byte{1}, 2, 3}))
	f.Add(AppendStatusPayload(nil, 1<<33, 1))
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
		if s, err := ParseSession(p); err == nil {
			same("session", AppendSession(nil, s))
		}
		if n, ids, err := ParseStatusPayload(p); err == nil {
			same("block status payload", AppendStatusPayload(nil, n, ids...))
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
	for h := SimpleReplies; h <= ExtendedHeaders; h++ {
		to := To{Cookie: 1, Offset: 2, Headers: h}
		f.Add(AppendRequest(nil, h, Request{FlagDF, CmdRead, 1, 2, 3}))
		f.Add(AppendSimpleReply(nil, 1, ENOSPC))
		f.Add(AppendNone(nil, to))
		f.Add(AppendOffsetData(nil, to, true, 2, 0))
		f.Add(AppendOffsetHole(nil, to, true, 2, 3))
		f.Add(AppendError(nil, to, EIO, "text"))
		f.Add(AppendErrorOffset(nil, to, true, EIO, "text", 9))
		f.Add(AppendBlockStatus(nil, to, true, 2, []State{{1, 0}}))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		for h := SimpleReplies; h <= ExtendedHeaders; h++ {
			if n := h.RequestLen(); len(p) >= n {
				if r, err := ParseRequest(p[:n], h); err == nil && !bytes.Equal(AppendRequest(nil, h, r), p[:n]) {
					t.Fatalf("%+v from %x", r, p)
				}
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
		if r.Simple {
			if got := AppendSimpleReply(nil, r.Cookie, r.Errno); !bytes.Equal(got, head) {
				t.Fatalf("%x from %x", got, head)
			}
			return
		}
		sameChunk(t, r, len(head), body)
	})
}

// sameChunk encodes the content of a chunk again.
func sameChunk(t *testing.T, r Reply, headLen int, body []byte) {
	to := To{Cookie: r.Cookie, Offset: r.Offset}
	if headLen == ExtChunkHeaderLen {
		to.Headers = ExtendedHeaders
	}
	var again []byte
	switch {
	case r.Type.IsError():
		e, text, off, err := ParseError(r.Type, body)
		if err != nil || r.Type != ChunkError && r.Type != ChunkErrorOffset {
			return
		}
		again = AppendError(nil, to, e, text)
		if r.Type == ChunkErrorOffset {
			again = AppendErrorOffset(nil, to, true, e, text, off)
		}
	case r.Type.IsStatus():
		context, states, err := ParseBlockStatus(nil, r.Type, body)
		if err != nil || (r.Type == ChunkBlockStatusExt) != (to.Headers == ExtendedHeaders) {
			return
		}
		again = AppendBlockStatus(nil, to, true, context, states)
	case r.Type == ChunkOffsetHole:
		off, n, err := ParseOffset(body, true)
		if err != nil {
			return
		}
		again = AppendOffsetHole(nil, to, true, off, int(n))
	default:
		return
	}
	if !bytes.Equal(again[headLen:], body) {
		t.Fatalf("chunk of type %d: %x from %x", r.Type, again[headLen:], body)
	}
}
