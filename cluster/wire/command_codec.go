package wire

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// Where the parts of an encoded command are. The head is the same for all
// types; what follows depends on the type.
const (
	commandHeadBytes = 80
	// MaxWriteBlocks bounds the blocks of one CmdWrite and of one ReqRead.
	MaxWriteBlocks = block.MaxEntryBytes / block.Size
	// payloadIDAt and writeBytes are those of CmdWrite.
	payloadIDAt = commandHeadBytes + 8
	writeBytes  = commandHeadBytes + 44
	// MaxCommandBytes bounds an encoded command.
	MaxCommandBytes = commandHeadBytes + 20 + MaxVolumeValueBytes
)

// knownFlags are the flags that this build gives a meaning to. Others are
// refused, since a flag may change what apply must do.
const knownFlags = FlagReadOnlyVolume

// AppendCommand appends the encoded command to dst. Fields that do not belong
// to the type are left out. len(c.CRCs) must be what PayloadBytes needs.
func AppendCommand(dst []byte, c *Command) []byte {
	dst = append(dst, EnvelopeVersion, byte(c.Type))
	dst = appendU16(dst, c.Flags)
	dst = appendU32(dst, uint32(c.Generation))
	dst = append(dst, c.Cluster[:]...)
	dst = append(dst, c.Volume[:]...)
	dst = appendU64(dst, uint64(c.Epoch))
	dst = appendU64(dst, uint64(c.Nonce))
	dst = appendU64(dst, uint64(c.Layout))
	dst = appendU64(dst, uint64(c.OpSeq))
	dst = appendU64(dst, uint64(c.Floor))
	switch c.Type {
	case CmdWrite:
		dst = appendPlace(dst, c)
		dst = appendU64(dst, c.Payload.Replica)
		dst = appendU64(dst, c.Payload.Incarnation)
		dst = appendU64(dst, c.Payload.Counter)
		dst = appendU32(dst, c.PayloadBytes)
		dst = appendU32(dst, uint32(c.KeyID))
		dst = append(dst, c.Codec, 0, 0, 0)
		dst = appendCRCs(dst, c.CRCs)
	case CmdZero:
		dst = appendPlace(dst, c)
	case CmdMark:
		dst = appendU32(dst, uint32(c.Chunk))
		dst = appendU32(dst, uint32(c.ToChunk))
	case CmdFence, CmdResize:
		dst = appendU64(dst, uint64(c.Size))
		dst = appendU64(dst, uint64(c.Settings))
		dst = appendU32(dst, uint32(len(c.VolumeValue)))
		dst = append(dst, c.VolumeValue...)
	case CmdFeature:
		dst = appendU32(dst, c.Feature)
	}
	return dst
}

func appendPlace(dst []byte, c *Command) []byte {
	dst = appendU32(dst, uint32(c.Chunk))
	dst = appendU16(dst, uint16(c.Block))
	return appendU16(dst, c.Count)
}

// DecodeCommand decodes data into c, all fields of which it sets. c keeps
// nothing of data. The capacity of c.CRCs is used again: who keeps them beyond
// the next decode into the same c clears the field first.
//
// A type, version, flag or codec that this build does not know is an error of
// kind Unsupported, on which a replica halts (S6); what no build writes is
// Invalid. A decoded command is consistent in itself: its blocks lie within
// their chunk, its payload's length and checksums fit its count.
func DecodeCommand(data []byte, c *Command) error {
	crcs := c.CRCs[:0]
	*c = Command{}
	r := reader{p: data}
	version := r.u8()
	c.Type = CommandType(r.u8())
	c.Flags = r.u16()
	c.Generation = block.Generation(r.u32())
	c.Cluster = r.uuid()
	c.Volume = r.uuid()
	c.Epoch = block.Epoch(r.u64())
	c.Nonce = block.Nonce(r.u64())
	c.Layout = block.LayoutVersion(r.u64())
	c.OpSeq = block.OpSeq(r.u64())
	c.Floor = block.OpSeq(r.u64())
	switch {
	case r.short:
		return block.Errorf(block.Invalid, "command of %d bytes is cut short", len(data))
	case version != EnvelopeVersion:
		return block.Errorf(block.Unsupported, "command format %d, this build knows %d", version, EnvelopeVersion)
	case c.Flags&^knownFlags != 0:
		return block.Errorf(block.Unsupported, "command flags %#x are not known to this build", c.Flags&^knownFlags)
	}
	var err error
	switch c.Type {
	case CmdWrite:
		err = c.decodeWrite(&r, crcs)
	case CmdZero:
		err = c.decodePlace(&r, block.BlocksPerChunk)
	case CmdMark:
		c.Chunk, c.ToChunk = block.Chunk(r.u32()), block.Chunk(r.u32())
		if !r.short && c.Chunk >= c.ToChunk {
			err = block.Errorf(block.Invalid, "marker over the chunks %d to %d", c.Chunk, c.ToChunk)
		}
	case CmdFence, CmdResize:
		err = c.decodeSettings(&r)
	case CmdDelete:
	case CmdFeature:
		c.Feature = r.u32()
	default:
		return block.Errorf(block.Unsupported, "command type %d is not known to this build", c.Type)
	}
	if err != nil {
		return err
	}
	return r.end("command")
}

func (c *Command) decodePlace(r *reader, most int) error {
	c.Chunk, c.Block, c.Count = block.Chunk(r.u32()), block.Index(r.u16()), r.u16()
	if !r.short && (c.Count == 0 || int(c.Count) > most || int(c.Block)+int(c.Count) > block.BlocksPerChunk) {
		return block.Errorf(block.Invalid, "command over %d blocks from block %d of a chunk", c.Count, c.Block)
	}
	return nil
}

func (c *Command) decodeWrite(r *reader, crcs []uint32) error {
	if err := c.decodePlace(r, MaxWriteBlocks); err != nil {
		return err
	}
	c.Payload = PayloadID{Replica: r.u64(), Incarnation: r.u64(), Counter: r.u64()}
	c.PayloadBytes = r.u32()
	c.KeyID = block.KeyID(r.u32())
	c.Codec = r.u8()
	reserved := r.take(3)
	switch {
	case r.short:
		return nil // the caller's end check reports it
	case c.Codec != 0 || reserved[0]|reserved[1]|reserved[2] != 0:
		return block.Errorf(block.Unsupported, "payload codec %d is not known to this build", c.Codec)
	case c.PayloadBytes != uint32(c.Count)*block.Size:
		return block.Errorf(block.Invalid, "payload of %d bytes for %d blocks", c.PayloadBytes, c.Count)
	}
	c.CRCs = r.crcs(crcs, int(c.Count))
	return nil
}

func (c *Command) decodeSettings(r *reader) error {
	c.Size = int64(r.u64())
	c.Settings = block.SettingsCounter(r.u64())
	n := r.u32()
	if n > MaxVolumeValueBytes {
		return block.Errorf(block.Invalid, "volume value of %d bytes", n)
	}
	c.VolumeValue = r.value(int(n))
	if c.Size < 0 || c.Size > block.MaxVolumeBytes {
		return block.Errorf(block.Invalid, "volume size of %d bytes", c.Size)
	}
	return nil
}

// PeekPayload returns the id and stored length of an encoded command's payload;
// false for a command that has none. It does not check the rest.
func PeekPayload(data []byte) (id PayloadID, bytes uint32, ok bool) {
	if len(data) < writeBytes || data[0] != EnvelopeVersion || CommandType(data[1]) != CmdWrite {
		return PayloadID{}, 0, false
	}
	p := data[payloadIDAt:]
	id = PayloadID{Replica: binary.LittleEndian.Uint64(p), Incarnation: binary.LittleEndian.Uint64(p[8:]),
		Counter: binary.LittleEndian.Uint64(p[16:])}
	return id, binary.LittleEndian.Uint32(p[24:]), true
}

// PatchPayloadID writes id into an encoded CmdWrite, in place. False for a
// command that has no payload: then data is unchanged.
func PatchPayloadID(data []byte, id PayloadID) bool {
	if _, _, ok := PeekPayload(data); !ok {
		return false
	}
	p := data[payloadIDAt:]
	binary.LittleEndian.PutUint64(p, id.Replica)
	binary.LittleEndian.PutUint64(p[8:], id.Incarnation)
	binary.LittleEndian.PutUint64(p[16:], id.Counter)
	return true
}
