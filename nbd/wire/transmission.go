package wire

// Request is the header of a request. A write's payload of Length bytes
// follows it.
type Request struct {
	Flags   CommandFlags
	Command Command
	// Cookie is the client's name for the request; replies carry it.
	Cookie uint64
	Offset uint64
	Length uint32
}

// AppendRequest appends r.
func AppendRequest(dst []byte, r Request) []byte {
	dst = be.AppendUint32(dst, magicRequest)
	dst = be.AppendUint16(dst, uint16(r.Flags))
	dst = be.AppendUint16(dst, uint16(r.Command))
	dst = be.AppendUint64(dst, r.Cookie)
	dst = be.AppendUint64(dst, r.Offset)
	return be.AppendUint32(dst, r.Length)
}

// ParseRequest reads the first RequestLen bytes of p, which must be as long.
// It allocates only to fail.
func ParseRequest(p []byte) (r Request, err error) {
	_ = p[RequestLen-1]
	if be.Uint32(p) != magicRequest {
		return r, malformed("request magic is %#x", be.Uint32(p))
	}
	r.Flags = CommandFlags(be.Uint16(p[4:]))
	r.Command = Command(be.Uint16(p[6:]))
	r.Cookie = be.Uint64(p[8:])
	r.Offset = be.Uint64(p[16:])
	r.Length = be.Uint32(p[24:])
	return r, nil
}

// AppendSimpleReply appends a simple reply; a successful read's data follow it.
func AppendSimpleReply(dst []byte, cookie uint64, e Errno) []byte {
	dst = be.AppendUint32(dst, magicSimple)
	dst = be.AppendUint32(dst, uint32(e))
	return be.AppendUint64(dst, cookie)
}

// Reply is the header of a simple reply or of a chunk of a structured one.
type Reply struct {
	Cookie uint64
	// Simple tells which of the other fields are set.
	Simple bool
	Errno  Errno
	// Done marks the last chunk; a simple reply is always the last.
	Done   bool
	Type   ChunkType
	Length uint32
}

// ReplyLen tells from the first four bytes of a reply how long its header is;
// 0 if it is none.
func ReplyLen(magic []byte) int {
	switch be.Uint32(magic) {
	case magicSimple:
		return SimpleReplyLen
	case magicStructured:
		return ChunkHeaderLen
	}
	return 0
}

// ParseReply reads a header of ReplyLen bytes. A chunk's Length is an
// unchecked claim. It allocates only to fail.
func ParseReply(p []byte) (r Reply, err error) {
	switch {
	case len(p) == SimpleReplyLen && be.Uint32(p) == magicSimple:
		return Reply{Simple: true, Done: true, Errno: Errno(be.Uint32(p[4:])), Cookie: be.Uint64(p[8:])}, nil
	case len(p) == ChunkHeaderLen && be.Uint32(p) == magicStructured:
		return Reply{Done: be.Uint16(p[4:])&ChunkDone != 0, Type: ChunkType(be.Uint16(p[6:])),
			Cookie: be.Uint64(p[8:]), Length: be.Uint32(p[16:])}, nil
	}
	return r, malformed("not a reply")
}

func appendChunk(dst []byte, cookie uint64, done bool, t ChunkType, n int) []byte {
	dst = be.AppendUint32(dst, magicStructured)
	var flags uint16
	if done {
		flags = ChunkDone
	}
	dst = be.AppendUint16(dst, flags)
	dst = be.AppendUint16(dst, uint16(t))
	dst = be.AppendUint64(dst, cookie)
	return be.AppendUint32(dst, uint32(n))
}

// AppendNone appends the empty last chunk of a reply.
func AppendNone(dst []byte, cookie uint64) []byte {
	return appendChunk(dst, cookie, true, ChunkNone, 0)
}

// AppendOffsetData appends the head of a chunk with n bytes read at off, which
// follow it.
func AppendOffsetData(dst []byte, cookie uint64, done bool, off uint64, n int) []byte {
	dst = appendChunk(dst, cookie, done, ChunkOffsetData, OffsetDataLen+n)
	return be.AppendUint64(dst, off)
}

// AppendOffsetHole appends a chunk that says that the n bytes at off are zero.
func AppendOffsetHole(dst []byte, cookie uint64, done bool, off uint64, n int) []byte {
	dst = appendChunk(dst, cookie, done, ChunkOffsetHole, OffsetHoleLen)
	dst = be.AppendUint64(dst, off)
	return be.AppendUint32(dst, uint32(n))
}

// ParseOffset reads the offset that an OffsetData chunk starts with, or with
// hole the offset and length of an OffsetHole chunk, which must fill p.
func ParseOffset(p []byte, hole bool) (off uint64, n uint32, err error) {
	switch {
	case hole && len(p) == OffsetHoleLen:
		return be.Uint64(p), be.Uint32(p[8:]), nil
	case !hole && len(p) >= OffsetDataLen:
		return be.Uint64(p), 0, nil
	}
	return 0, 0, malformed("content chunk of %d bytes", len(p))
}

// AppendError appends the last chunk of a reply that failed. Text is for people.
func AppendError(dst []byte, cookie uint64, e Errno, text string) []byte {
	text = Cut(text)
	dst = appendChunk(dst, cookie, true, ChunkError, 6+len(text))
	dst = be.AppendUint32(dst, uint32(e))
	dst = be.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// AppendErrorOffset appends a chunk that says that the read failed at off.
func AppendErrorOffset(dst []byte, cookie uint64, done bool, e Errno, text string, off uint64) []byte {
	text = Cut(text)
	dst = appendChunk(dst, cookie, done, ChunkErrorOffset, 14+len(text))
	dst = be.AppendUint32(dst, uint32(e))
	dst = be.AppendUint16(dst, uint16(len(text)))
	dst = append(dst, text...)
	return be.AppendUint64(dst, off)
}

// ParseError reads the content of an error chunk of either type. Unknown error
// types are read as ChunkError with anything after the text.
func ParseError(t ChunkType, p []byte) (e Errno, text string, off uint64, err error) {
	if len(p) < 6 {
		return 0, "", 0, malformed("error chunk of %d bytes", len(p))
	}
	e = Errno(be.Uint32(p))
	n := int(be.Uint16(p[4:]))
	rest := len(p) - 6 - n
	if e == 0 || rest < 0 || t == ChunkErrorOffset && rest != 8 || t == ChunkError && rest != 0 {
		return 0, "", 0, malformed("error chunk of %d bytes with %d bytes of text", len(p), n)
	}
	if text, err = checkString(p[6:6+n], "error text"); err != nil {
		return 0, "", 0, err
	}
	if t == ChunkErrorOffset {
		off = be.Uint64(p[6+n:])
	}
	return e, text, off, nil
}

// State is an extent of a metadata context.
type State struct {
	Length uint32
	Flags  uint32
}

// AppendBlockStatus appends the head of a block status chunk with n extents,
// each to be appended by AppendState.
func AppendBlockStatus(dst []byte, cookie uint64, done bool, context uint32, n int) []byte {
	dst = appendChunk(dst, cookie, done, ChunkBlockStatus, 4+n*ExtentLen)
	return be.AppendUint32(dst, context)
}

// AppendState appends one extent of a block status chunk.
func AppendState(dst []byte, s State) []byte {
	dst = be.AppendUint32(dst, s.Length)
	return be.AppendUint32(dst, s.Flags)
}

// ParseBlockStatus appends the extents of a block status chunk to dst.
func ParseBlockStatus(dst []State, p []byte) (context uint32, _ []State, err error) {
	if len(p) < 4+ExtentLen || (len(p)-4)%ExtentLen != 0 {
		return 0, dst, malformed("block status of %d bytes", len(p))
	}
	context = be.Uint32(p)
	for p = p[4:]; len(p) > 0; p = p[ExtentLen:] {
		s := State{be.Uint32(p), be.Uint32(p[4:])}
		if s.Length == 0 {
			return 0, dst, malformed("empty extent")
		}
		dst = append(dst, s)
	}
	return context, dst, nil
}
