package block_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"firn.io/firn/internal/block"
)

func TestVersionOrdersByEraThenIndex(t *testing.T) {
	order := []block.Version{block.MakeVersion(0, 0), block.MakeVersion(0, block.MaxRaftIndex), block.MakeVersion(1, 0), block.MakeVersion(1, 9), block.MakeVersion(65535, 1)}
	for i, v := range order {
		if i > 0 && order[i-1] >= v {
			t.Errorf("%v is not below %v", order[i-1], v)
		}
		if block.MakeVersion(v.Era(), v.RaftIndex()) != v {
			t.Errorf("%v does not survive its parts", v)
		}
	}
}

func TestPositions(t *testing.T) {
	for _, off := range []int64{0, 4095, 4096, block.ChunkBytes - 1, block.ChunkBytes, block.SpanBytes + 12345, block.MaxVolumeBytes - 1} {
		c, i := block.ChunkAt(off), block.IndexAt(off)
		if got := block.Offset(c, i); got > off || off-got >= block.Size {
			t.Errorf("offset %d is block %d of chunk %d, which starts at %d", off, i, c, got)
		}
		if want := block.Span(off / block.SpanBytes); c.Span() != want {
			t.Errorf("offset %d is in span %d, want %d", off, c.Span(), want)
		}
	}
}

func TestUUIDRoundTrip(t *testing.T) {
	u := block.NewUUID()
	back, err := block.ParseUUID(block.FormatUUID(u))
	if err != nil || back != u {
		t.Fatalf("%v, %v", back, err)
	}
	for _, bad := range []string{"", "x", "00000000-0000-0000-0000-00000000000", "00000000-0000-0000-0000-00000000000g", "000000000000-0000-0000-0000-00000000"} {
		if _, err := block.ParseUUID(bad); err == nil {
			t.Errorf("%q was taken for a UUID", bad)
		}
	}
}

func TestErrorKinds(t *testing.T) {
	err := fmt.Errorf("open: %w", block.Wrap(block.Busy, io.ErrUnexpectedEOF, "volume %q is attached", "db"))
	if !errors.Is(err, block.Busy) || errors.Is(err, block.NotFound) || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v does not match its kind and cause only", err)
	}
	if block.KindOf(err) != block.Busy || block.KindOf(io.EOF) != block.Internal || block.KindOf(block.NoSpace) != block.NoSpace {
		t.Error("KindOf")
	}
	if got, want := err.Error(), `open: volume "db" is attached: unexpected EOF`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCRCPerBlock(t *testing.T) {
	p := make([]byte, 3*block.Size)
	p[block.Size] = 1
	crcs := block.AppendCRCs(nil, p)
	if len(crcs) != 3 || crcs[0] != crcs[2] || crcs[0] == crcs[1] {
		t.Fatalf("%x", crcs)
	}
	// RFC 3720 B.4: 32 bytes of zeroes.
	if got := block.CRC(make([]byte, 32)); got != 0x8a9136aa {
		t.Fatalf("CRC32C is %#x", got)
	}
}
