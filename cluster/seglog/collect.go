package seglog

type collector struct {
	running bool
	check   bool
	pokes   uint64
	budget  int64
}

func (g *collector) earn(bytes int) {}
func (l *Log) collect()             {}
