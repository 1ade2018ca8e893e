package iscsitest

import (
	"context"
	"encoding/binary"
	"sync"

	"firn.io/firn/internal/block"
)

// Device is LUN 0 of a session as a block.Device. What does not begin and end
// at a logical block it reads, changes and writes back, alone.
type Device struct {
	c  *Client
	mu sync.RWMutex
	g  block.Geometry
}

// NewDevice asks the target how large the unit is.
func NewDevice(ctx context.Context, c *Client) (*Device, error) {
	d := &Device{c: c}
	return d, d.refresh(ctx)
}

func (d *Device) refresh(ctx context.Context) error {
	in := make([]byte, 32)
	cdb := make([]byte, 16)
	cdb[0], cdb[1], cdb[13] = 0x9e, 0x10, 32
	// The first command is told of the power on.
	for range 3 {
		r, err := d.c.Do(ctx, cdb, nil, in)
		if err != nil {
			return err
		}
		if r.Status == 0 {
			bs := int(binary.BigEndian.Uint32(in[8:]))
			d.g = block.Geometry{SizeBytes: int64(binary.BigEndian.Uint64(in)+1) * int64(bs), LogicalBlockBytes: bs, PreferredBytes: block.Size, MaxBytes: 1 << 20}
			return nil
		}
	}
	return block.Errorf(block.Unavailable, "the unit does not tell its size")
}

// Geometry implements block.Device.
func (d *Device) Geometry() block.Geometry { return d.g }

// do runs a command and makes an error of its sense data.
func (d *Device) do(ctx context.Context, cdb, out, in []byte) error {
	if ctx.Err() != nil {
		return block.Wrap(block.Canceled, ctx.Err(), "iscsitest")
	}
	r, err := d.c.Do(ctx, cdb, out, in)
	if err != nil || r.Status == 0 {
		return err
	}
	if r.Status != 2 || len(r.Sense) < 14 {
		return block.Errorf(block.Unavailable, "status %#x", r.Status)
	}
	kinds := map[uint16]block.Kind{0x2100: block.OutOfRange, 0x2700: block.ReadOnly, 0x2707: block.NoSpace, 0x1100: block.Corrupt, 0x040b: block.Fenced, 0x2400: block.Invalid}
	return block.Errorf(kinds[binary.BigEndian.Uint16(r.Sense[12:])], "sense % x", r.Sense)
}

func (d *Device) check(off, n int64) error {
	if off < 0 || n < 0 || off > d.g.SizeBytes || n > d.g.SizeBytes-off {
		return block.Errorf(block.OutOfRange, "%d bytes at %d", n, off)
	}
	return nil
}

// cdb16 addresses whole blocks.
func (d *Device) cdb16(op byte, off, n int64) []byte {
	bs := int64(d.g.LogicalBlockBytes)
	cdb := make([]byte, 16)
	cdb[0] = op
	binary.BigEndian.PutUint64(cdb[2:], uint64(off/bs))
	binary.BigEndian.PutUint32(cdb[10:], uint32(n/bs))
	return cdb
}

// around widens a range to whole blocks.
func (d *Device) around(off, n int64) (from, to int64) {
	bs := int64(d.g.LogicalBlockBytes)
	return off / bs * bs, (off + n + bs - 1) / bs * bs
}

// ReadAt implements block.Device.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := d.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	from, to := d.around(off, int64(len(p)))
	if from == off && to == off+int64(len(p)) {
		return d.do(ctx, d.cdb16(0x88, from, to-from), nil, p)
	}
	whole := make([]byte, to-from)
	err := d.do(ctx, d.cdb16(0x88, from, to-from), nil, whole)
	copy(p, whole[off-from:])
	return err
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	if err := d.check(off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	from, to := d.around(off, int64(len(p)))
	if from == off && to == off+int64(len(p)) {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return d.write(ctx, p, off, f)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	whole := make([]byte, to-from)
	if err := d.do(ctx, d.cdb16(0x88, from, to-from), nil, whole); err != nil {
		return err
	}
	copy(whole[off-from:], p)
	return d.write(ctx, whole, from, f)
}

func (d *Device) write(ctx context.Context, p []byte, off int64, f block.Flags) error {
	cdb := d.cdb16(0x8a, off, int64(len(p)))
	if f&block.FUA != 0 {
		cdb[1] = 0x08
	}
	// The caller may change p after a canceled call; the session may still send it.
	return d.do(ctx, cdb, append([]byte(nil), p...), nil)
}

// Flush implements block.Device.
func (d *Device) Flush(ctx context.Context) error {
	return d.do(ctx, d.cdb16(0x91, 0, 0), nil, nil)
}

// Trim implements block.Device, by UNMAP of whole blocks.
func (d *Device) Trim(ctx context.Context, off, n int64, _ block.Flags) error {
	if err := d.check(off, n); err != nil {
		return err
	}
	return d.zero(ctx, off, n, func(from, to int64) error {
		bs := int64(d.g.LogicalBlockBytes)
		const most = 1<<32 - 1
		for at := from; at < to; {
			k := min(to-at, most*bs)
			list := make([]byte, 24)
			binary.BigEndian.PutUint16(list, 22)
			binary.BigEndian.PutUint16(list[2:], 16)
			binary.BigEndian.PutUint64(list[8:], uint64(at/bs))
			binary.BigEndian.PutUint32(list[16:], uint32(k/bs))
			cdb := make([]byte, 10)
			cdb[0], cdb[8] = 0x42, 24
			if err := d.do(ctx, cdb, list, nil); err != nil {
				return err
			}
			at += k
		}
		return nil
	})
}

// manyBlocks is what takes too many commands of WRITE SAME.
const manyBlocks = 1 << 30

// WriteZeroes implements block.Device, by WRITE SAME without data; large ranges
// by UNMAP, after which blocks read as zero, too (LBPRZ).
func (d *Device) WriteZeroes(ctx context.Context, off, n int64, f block.Flags) error {
	if err := d.check(off, n); err != nil {
		return err
	}
	if n >= manyBlocks {
		return d.Trim(ctx, off, n, f)
	}
	return d.zero(ctx, off, n, func(from, to int64) error {
		for at := from; at < to; {
			k := min(to-at, 16<<20)
			cdb := d.cdb16(0x93, at, k)
			cdb[1] = 1
			if err := d.do(ctx, cdb, nil, nil); err != nil {
				return err
			}
			at += k
		}
		return nil
	})
}

// zero writes zeros at the edges and calls inner for the blocks between them.
func (d *Device) zero(ctx context.Context, off, n int64, inner func(from, to int64) error) error {
	if n == 0 {
		return nil
	}
	bs := int64(d.g.LogicalBlockBytes)
	from, to := (off+bs-1)/bs*bs, (off+n)/bs*bs
	if from >= to {
		return d.edges(ctx, off, n)
	}
	if err := d.edges(ctx, off, from-off); err != nil {
		return err
	}
	if err := d.edges(ctx, to, off+n-to); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return inner(from, to)
}

func (d *Device) edges(ctx context.Context, off, n int64) error {
	if n == 0 {
		return nil
	}
	return d.WriteAt(ctx, make([]byte, n), off, 0)
}

// Extents implements block.Device, by GET LBA STATUS.
func (d *Device) Extents(ctx context.Context, dst []block.Extent, off, n int64, limit int) ([]block.Extent, error) {
	if err := d.check(off, n); err != nil || n == 0 {
		return dst, err
	}
	bs := int64(d.g.LogicalBlockBytes)
	have := len(dst)
	for end := off + n; off < end && len(dst)-have < limit; {
		in := make([]byte, 8+16*64)
		cdb := make([]byte, 16)
		cdb[0], cdb[1] = 0x9e, 0x12
		binary.BigEndian.PutUint64(cdb[2:], uint64(off/bs))
		binary.BigEndian.PutUint32(cdb[10:], uint32(len(in)))
		if err := d.do(ctx, cdb, nil, in); err != nil {
			return dst, err
		}
		list := in[8:min(len(in), int(binary.BigEndian.Uint32(in))+4)]
		before := off
		for ; len(list) >= 16 && off < end; list = list[16:] {
			to := min(end, (int64(binary.BigEndian.Uint64(list))+int64(binary.BigEndian.Uint32(list[8:])))*bs)
			state := block.Data
			if list[12] != 0 {
				state = block.Hole
			}
			if last := len(dst) - 1; last >= have && dst[last].State == state {
				dst[last].Bytes += to - off
			} else if len(dst)-have == limit {
				return dst, nil
			} else {
				dst = append(dst, block.Extent{Bytes: to - off, State: state})
			}
			off = to
		}
		if off == before {
			return dst, block.Errorf(block.Internal, "GET LBA STATUS tells nothing at %d", off)
		}
	}
	return dst, nil
}
