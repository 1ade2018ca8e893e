package wire

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"firn.io/firn/internal/block"
)

func fill(r *rand.Rand) (u [16]byte) {
	for i := range u {
		u[i] = byte(r.Uint32())
	}
	return u
}

// randomCommand returns a command that only sets what its type carries.
func randomCommand(r *rand.Rand, typ CommandType) Command {
	c := Command{
		Type: typ, Cluster: fill(r), Volume: fill(r), Epoch: block.Epoch(r.Uint64()), Nonce: block.Nonce(r.Uint64()),
		Generation: block.Generation(r.Uint32()), Layout: block.LayoutVersion(r.Uint64()),
		OpSeq: block.OpSeq(r.Uint64()), Floor: block.OpSeq(r.Uint64()),
	}
	switch typ {
	case CmdWrite, CmdZero:
		c.Chunk = block.Chunk(r.Uint32())
		c.Count = uint16(1 + r.IntN(MaxWriteBlocks))
		c.Block = block.Index(r.IntN(block.BlocksPerChunk - int(c.Count) + 1))
	case CmdMark:
		c.Chunk = block.Chunk(r.Uint32N(1 << 30))
		c.ToChunk = c.Chunk + 1 + block.Chunk(r.Uint32N(1<<30))
	case CmdFence, CmdResize:
		c.Size = r.Int64N(block.MaxVolumeBytes)
		c.Settings = block.SettingsCounter(r.Uint64())
		c.VolumeValue = bytes.Repeat([]byte{7}, 1+r.IntN(2000))
		c.Flags = FlagReadOnlyVolume
	case CmdFeature:
		c.Feature = r.Uint32()
	}
	if typ == CmdWrite {
		c.Payload = PayloadID{r.Uint64(), r.Uint64(), r.Uint64()}
		c.PayloadBytes = uint32(c.Count) * block.Size
		c.KeyID = block.KeyID(r.Uint32())
		for range c.Count {
			c.CRCs = append(c.CRCs, r.Uint32())
		}
	}
	return c
}

var commandTypes = []CommandType{CmdWrite, CmdZero, CmdMark, CmdFence, CmdDelete, CmdResize, CmdFeature}

func TestCommandRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, typ := range commandTypes {
		for range 50 {
			want := randomCommand(r, typ)
			data := AppendCommand([]byte("before"), &want)[len("before"):]
			got := Command{Feature: 99, VolumeValue: []byte{1}, CRCs: make([]uint32, 3)}
			if err := DecodeCommand(data, &got); err != nil {
				t.Fatalf("type %d: %v", typ, err)
			}
			if len(got.CRCs) == 0 {
				got.CRCs = nil
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("type %d: got %+v\nwant %+v", typ, got, want)
			}
			for n := range data {
				if err := DecodeCommand(data[:n], &got); !errors.Is(err, block.Invalid) {
					t.Fatalf("type %d cut at %d of %d: %v", typ, n, len(data), err)
				}
			}
			if err := DecodeCommand(append(data, 0), &got); !errors.Is(err, block.Invalid) {
				t.Fatalf("type %d with a byte too many: %v", typ, err)
			}
		}
	}
}

func TestCommandOfOneBlockIsSmall(t *testing.T) {
	c := randomCommand(rand.New(rand.NewPCG(1, 2)), CmdWrite)
	c.Count, c.Block, c.CRCs, c.PayloadBytes = 1, 0, c.CRCs[:1], block.Size
	if n := len(AppendCommand(nil, &c)); n > 128 {
		t.Errorf("%d bytes", n)
	}
	var into Command
	data := AppendCommand(nil, &c)
	if err := DecodeCommand(data, &into); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		data = AppendCommand(data[:0], &c)
		if err := DecodeCommand(data, &into); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestPatchPayloadID(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 3))
	for _, typ := range commandTypes {
		c := randomCommand(r, typ)
		data := AppendCommand(nil, &c)
		before := bytes.Clone(data)
		id := PayloadID{1, 2, 3}
		if ok := PatchPayloadID(data, id); ok != (typ == CmdWrite) {
			t.Fatalf("type %d: %v", typ, ok)
		}
		if typ != CmdWrite {
			if !bytes.Equal(before, data) {
				t.Errorf("type %d was changed", typ)
			}
			continue
		}
		got, n, ok := PeekPayload(data)
		if !ok || got != id || n != c.PayloadBytes {
			t.Errorf("%v %d %v", got, n, ok)
		}
		var back Command
		if err := DecodeCommand(data, &back); err != nil || back.Payload != id {
			t.Errorf("%v %v", back.Payload, err)
		}
		back.Payload = c.Payload
		if !reflect.DeepEqual(back, c) {
			t.Error("the patch changed more than the id")
		}
	}
	for n := range 200 {
		if PatchPayloadID(bytes.Repeat([]byte{1}, n), PayloadID{}) != (n >= writeBytes) {
			t.Errorf("%d bytes", n)
		}
	}
}

func TestCommandsThatDoNotMakeSense(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 4))
	for name, c := range map[string]struct {
		typ   CommandType
		spoil func(*Command)
		kind  block.Kind
	}{
		"no blocks":         {CmdZero, func(c *Command) { c.Count = 0 }, block.Invalid},
		"beyond its chunk":  {CmdZero, func(c *Command) { c.Block, c.Count = 1000, 25 }, block.Invalid},
		"too long a write":  {CmdWrite, func(c *Command) { c.Block, c.Count = 0, 257 }, block.Invalid},
		"wrong length":      {CmdWrite, func(c *Command) { c.PayloadBytes++ }, block.Invalid},
		"unknown codec":     {CmdWrite, func(c *Command) { c.Codec = 1 }, block.Unsupported},
		"unknown type":      {99, func(*Command) {}, block.Unsupported},
		"unknown flag":      {CmdZero, func(c *Command) { c.Flags = 1 << 9 }, block.Unsupported},
		"empty marker":      {CmdMark, func(c *Command) { c.ToChunk = c.Chunk }, block.Invalid},
		"negative size":     {CmdFence, func(c *Command) { c.Size = -1 }, block.Invalid},
		"size out of range": {CmdResize, func(c *Command) { c.Size = block.MaxVolumeBytes + 1 }, block.Invalid},
		"too big a value":   {CmdFence, func(c *Command) { c.VolumeValue = make([]byte, MaxVolumeValueBytes+1) }, block.Invalid},
	} {
		cmd := randomCommand(r, c.typ)
		c.spoil(&cmd)
		var got Command
		if err := DecodeCommand(AppendCommand(nil, &cmd), &got); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want kind %q", name, err, c.kind)
		}
	}
	cmd := randomCommand(r, CmdZero)
	data := AppendCommand(nil, &cmd)
	data[0] = 2
	if err := DecodeCommand(data, &cmd); !errors.Is(err, block.Unsupported) {
		t.Errorf("newer format: %v", err)
	}
}

func randomRequest(r *rand.Rand, kind RequestKind) Request {
	q := Request{ID: r.Uint64(), Kind: kind, Group: block.GroupID(r.Uint64()), Layout: block.LayoutVersion(r.Uint64())}
	if kind == ReqPropose {
		q.Command = randomCommand(r, commandTypes[r.IntN(len(commandTypes))])
		return q
	}
	q.Volume, q.Epoch, q.Nonce = fill(r), block.Epoch(r.Uint64()), block.Nonce(r.Uint64())
	q.Generation, q.Token, q.LeaderOnly = block.Generation(r.Uint32()), block.Version(r.Uint64()), r.IntN(2) == 0
	q.Chunk = block.Chunk(r.Uint32N(1 << 20))
	q.ToChunk = q.Chunk + 1 + block.Chunk(r.Uint32N(MaxMapChunks))
	q.Count = uint16(1 + r.IntN(MaxWriteBlocks))
	q.Block = block.Index(r.IntN(block.BlocksPerChunk - int(q.Count) + 1))
	return q
}

func TestRequestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 5))
	for _, kind := range []RequestKind{ReqPropose, ReqRead, ReqMap, ReqRecord} {
		for range 50 {
			want := randomRequest(r, kind)
			data := AppendRequest(nil, &want)
			var got Request
			if err := DecodeRequest(data, &got); err != nil {
				t.Fatalf("kind %d: %v", kind, err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Fatalf("kind %d: got %+v\nwant %+v", kind, got, want)
			}
			for n := range data {
				err := DecodeRequest(data[:n], &got)
				if !errors.Is(err, block.Invalid) {
					t.Fatalf("kind %d cut at %d: %v", kind, n, err)
				}
				if n >= 28 && got.ID != want.ID {
					t.Fatalf("kind %d cut at %d lost its id", kind, n)
				}
			}
		}
	}
}

func randomResponse(r *rand.Rand) Response {
	s := Response{ID: r.Uint64(), Status: Status(1 + r.IntN(12)), Group: block.GroupID(r.Uint64()), Leader: block.NodeID(r.Uint32()),
		Applied: block.Version(r.Uint64()), NewLayout: block.LayoutVersion(r.Uint64()), Covered: block.Chunk(r.Uint32())}
	if r.IntN(2) == 0 {
		s.Text = "because"
	}
	if r.IntN(2) == 0 {
		s.Result = ApplyResult{Outcome: Outcome(1 + r.IntN(9)), Version: block.Version(r.Uint64()),
			ReplacedEpoch: block.Epoch(r.Uint64()), ReplacedNonce: block.Nonce(r.Uint64())}
	}
	if r.IntN(2) == 0 {
		s.Result.Record = VolumeRecord{Volume: fill(r), Epoch: block.Epoch(r.Uint64()), Nonce: block.Nonce(r.Uint64()),
			Generation: block.Generation(r.Uint32()), Size: r.Int64N(block.MaxVolumeBytes), Settings: block.SettingsCounter(r.Uint64()),
			ReadOnly: r.IntN(2) == 0, Tombstone: r.IntN(2) == 0, VolumeValue: []byte("value")}
	}
	if r.IntN(2) == 0 {
		for range 1 + r.IntN(20) {
			s.Runs = append(s.Runs, Run{Chunk: block.Chunk(r.Uint32()), Block: block.Index(r.IntN(1000)), Count: uint16(1 + r.IntN(20)),
				State: block.ExtentState(r.IntN(3))})
		}
		for range r.IntN(20) {
			s.CRCs = append(s.CRCs, r.Uint32())
		}
	}
	return s
}

func TestResponseRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 6))
	for range 300 {
		want := randomResponse(r)
		data := AppendResponse(nil, &want)
		var got Response
		if err := DecodeResponse(data, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v\nwant %+v", got, want)
		}
		for n := range data {
			if err := DecodeResponse(data[:n], &got); !errors.Is(err, block.Invalid) {
				t.Fatalf("cut at %d of %d: %v", n, len(data), err)
			}
		}
	}
}

// TestDefiniteOutcomes pins which outcomes end an operation (W4).
func TestDefiniteOutcomes(t *testing.T) {
	for o := range Outcome(20) {
		want := o == OutcomeApplied || o >= OutcomeOutOfRange && o <= OutcomeInvalid
		if o.Definite() != want {
			t.Errorf("outcome %d", o)
		}
	}
}

func FuzzDecodeCommand(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 7))
	for _, typ := range commandTypes {
		c := randomCommand(r, typ)
		f.Add(AppendCommand(nil, &c))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var c, again Command
		PeekPayload(data)
		if DecodeCommand(data, &c) != nil {
			return
		}
		if out := AppendCommand(nil, &c); !bytes.Equal(out, data) {
			t.Fatalf("%x became %x", data, out)
		}
		if err := DecodeCommand(data, &again); err != nil || !reflect.DeepEqual(c, again) {
			t.Fatal("decoding is not deterministic")
		}
	})
}

func FuzzDecodeRequest(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 8))
	for kind := range RequestKind(6) {
		q := randomRequest(r, kind)
		f.Add(AppendRequest(nil, &q))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var q Request
		if DecodeRequest(data, &q) == nil && !bytes.Equal(AppendRequest(nil, &q), data) {
			t.Fatalf("%x is not what %+v encodes to", data, q)
		}
	})
}

func FuzzDecodeResponse(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 9))
	for range 10 {
		s := randomResponse(r)
		f.Add(AppendResponse(nil, &s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var s, again Response
		if DecodeResponse(data, &s) != nil {
			return
		}
		if err := DecodeResponse(AppendResponse(nil, &s), &again); err != nil {
			t.Fatalf("%+v does not decode again: %v", s, err)
		}
	})
}

func BenchmarkWriteCommand(b *testing.B) {
	c := randomCommand(rand.New(rand.NewPCG(1, 2)), CmdWrite)
	c.Count, c.Block, c.CRCs, c.PayloadBytes = 1, 0, c.CRCs[:1], block.Size
	var data []byte
	var into Command
	b.ReportAllocs()
	for b.Loop() {
		data = AppendCommand(data[:0], &c)
		if err := DecodeCommand(data, &into); err != nil {
			b.Fatal(err)
		}
	}
}
